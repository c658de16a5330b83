// What `python -m benchmarks.kernel` times re-routing against: nothing at all, and the method of the paper written out
// with one launch a phase, over int64 ids, as its authors' code does it: no ranking (the first S columns are primary),
// no masks, no gates, no counters, every expert looked at for every substitute.

extern "C" __global__ void empty() {}

// One block. `primary_E` says which experts sit in the first S columns.
extern "C" __global__ void mark_primary(const long long *ids_TK, int T, int K, int E, int select_top_k, int *primary_E) {
    for (int e = threadIdx.x; e < E; e += blockDim.x) primary_E[e] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < T * select_top_k; i += blockDim.x)
        primary_E[ids_TK[i / select_top_k * K + i % select_top_k]] = 1;
}

// A block for each expert, a thread for each candidate.
extern "C" __global__ void find_substitutes(const float *similarity_EE, int E, const int *primary_E, float threshold,
                                            long long *substitute_E) {
    __shared__ float best_similarity[1024];
    __shared__ int best[1024];
    int e = blockIdx.x, p = threadIdx.x;
    best_similarity[p] = p < E && primary_E[p] ? similarity_EE[e * E + p] : -1.0f;
    best[p] = p;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (p < half && (best_similarity[p + half] > best_similarity[p] ||
                         (best_similarity[p + half] == best_similarity[p] && best[p + half] < best[p]))) {
            best_similarity[p] = best_similarity[p + half];
            best[p] = best[p + half];
        }
    }
    if (p == 0) substitute_E[e] = primary_E[e] || best_similarity[0] < threshold ? e : best[0];
}

// A thread for each slot.
extern "C" __global__ void replace(long long *ids_TK, int slots, const long long *substitute_E) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < slots) ids_TK[i] = substitute_E[ids_TK[i]];
}
