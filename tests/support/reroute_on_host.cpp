// reroute.cu as a shared library for the CPU: one function a kernel, which returns null or what went wrong.

#include "cuda_on_host.h"

#include "reroute.cu"

#define ON_HOST(kernel)                                                                                            \
    extern "C" const char *kernel##_on_host(unsigned blocks, unsigned threads, unsigned seed, const Step *step) { \
        return cuda_on_host::launch(blocks, threads, seed, [=] { kernel(*step); });                                \
    }

ON_HOST(reroute)
ON_HOST(reroute_vote)
ON_HOST(reroute_settle)
