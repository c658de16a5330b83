// benchmarks/baselines.cu as a shared library for the CPU: one function a kernel, which returns null or what went wrong.

#include "cuda_on_host.h"

#include "baselines.cu"

#define LAUNCH(call) return cuda_on_host::launch(blocks, threads, seed, [=] { call; })
#define SHAPE unsigned blocks, unsigned threads, unsigned seed

extern "C" {
const char *empty_on_host(SHAPE) { LAUNCH(empty()); }

const char *gate_on_host(SHAPE, const float *logits_TE, int T, int K, float *weights_TK, int *ids_TK) {
    LAUNCH(gate(logits_TE, T, K, weights_TK, ids_TK));
}

const char *mark_primary_on_host(SHAPE, const long long *ids_TK, int T, int K, int E, int select_top_k, int *primary_E) {
    LAUNCH(mark_primary(ids_TK, T, K, E, select_top_k, primary_E));
}

const char *find_substitutes_on_host(SHAPE, const float *similarity_EE, int E, const int *primary_E, float threshold,
                                     long long *substitute_E) {
    LAUNCH(find_substitutes(similarity_EE, E, primary_E, threshold, substitute_E));
}

const char *replace_on_host(SHAPE, long long *ids_TK, int slots, const long long *substitute_E) {
    LAUNCH(replace(ids_TK, slots, substitute_E));
}
}
