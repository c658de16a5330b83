// A stand-in for NVIDIA's driver: prints what a launch hands to it, after the layouts of cuda.h. Every other call succeeds.

#include <stdio.h>
#include <string.h>

typedef struct {
    int id;
    char padding[4];
    union {
        int programmatic_stream_serialization_allowed;
        char room[64];
    } value;
} LaunchAttribute;

typedef struct {
    unsigned grid[3], block[3], shared_bytes;
    void *stream;
    LaunchAttribute *attributes;
    unsigned num_attributes;
} LaunchConfig;

enum { STRUCT_BYTES = 16 * 8 + 5 * 4 + 4 };  // struct Step: pointers, numbers, and padding to a multiple of 8

static int succeed(void) { return 0; }

int cuLaunchKernelEx(const LaunchConfig *config, void *function, void **parameters, void **extra) {
    printf("%u %u %u %u %u %u, stream %p, function %p, extra %p,", config->grid[0], config->grid[1], config->grid[2],
           config->block[0], config->block[1], config->block[2], config->stream, function, (void *)extra);
    for (unsigned i = 0; i < config->num_attributes; ++i)
        printf(" attribute %d = %d,", config->attributes[i].id,
               config->attributes[i].value.programmatic_stream_serialization_allowed);
    for (int i = 0; i < STRUCT_BYTES; ++i) printf(i ? "%02x" : " %02x", ((unsigned char *)parameters[0])[i]);
    printf("\n");
    return 0;
}

int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, void *status) {
    (void)version, (void)flags, (void)status;
    *function = strcmp(name, "cuLaunchKernelEx") == 0      ? (void *)cuLaunchKernelEx
                : strcmp(name, "cuGetProcAddress") == 0 ? (void *)cuGetProcAddress_v2
                                                        : (void *)succeed;
    return 0;
}
