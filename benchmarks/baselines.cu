// What `python -m benchmarks.kernel` times re-routing against: nothing at all, the router's own kernel, and the method of
// the paper in three launches.

extern "C" __global__ void empty() {}

// Softmax and top-k as vLLM's `topk_softmax` does them where E is a power of two: a warp for each token, its experts spread
// over the lanes; each of K rounds finds the largest probability left. Compiled for one E, as vLLM's is.
constexpr int EXPERTS_A_LANE = (EXPERTS + 31) / 32;
constexpr unsigned ALL = 0xffffffffu;
constexpr float LOWEST = -3.4e38f, TAKEN = -1.0f;  // below any score, and below any probability

extern "C" __global__ void gate(const float *logits_TE, int T, int K, float *weights_TK, int *ids_TK) {
    int token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= T) return;  // the whole warp

    float probability[EXPERTS_A_LANE], largest = LOWEST, sum = 0.0f;
    for (int i = 0; i < EXPERTS_A_LANE; ++i) {
        int expert = i * 32 + lane;
        probability[i] = expert < EXPERTS ? logits_TE[token * EXPERTS + expert] : LOWEST;
        largest = fmaxf(largest, probability[i]);
    }
    for (int other = 16; other > 0; other /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, other));
    for (int i = 0; i < EXPERTS_A_LANE; ++i) sum += probability[i] = expf(probability[i] - largest);
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(ALL, sum, other);
    for (int i = 0; i < EXPERTS_A_LANE; ++i) probability[i] = i * 32 + lane < EXPERTS ? probability[i] / sum : TAKEN;

    float weight = 0.0f, chosen = 0.0f;
    int id = 0;
    for (int k = 0; k < K; ++k) {
        float best = TAKEN;
        int expert = EXPERTS;
        for (int i = 0; i < EXPERTS_A_LANE; ++i)
            if (probability[i] > best) {
                best = probability[i];
                expert = i * 32 + lane;
            }
        for (int other = 16; other > 0; other /= 2) {
            float its_best = __shfl_xor_sync(ALL, best, other);
            int its_expert = __shfl_xor_sync(ALL, expert, other);
            if (its_best > best || (its_best == best && its_expert < expert)) {
                best = its_best;
                expert = its_expert;
            }
        }
        for (int i = 0; i < EXPERTS_A_LANE; ++i)
            if (i * 32 + lane == expert) probability[i] = TAKEN;
        chosen += best;
        if (lane == k) {
            weight = best;
            id = expert;
        }
    }
    if (lane < K) {
        weights_TK[token * K + lane] = weight / chosen;
        ids_TK[token * K + lane] = id;
    }
}

// The method of the paper written out with one launch a phase, over int64 ids, as its authors' code does it: no ranking (the
// first S columns are primary), no masks, no gates, no counters, every expert looked at for every substitute.

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
