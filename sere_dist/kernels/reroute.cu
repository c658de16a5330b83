// Re-routes one step of one MoE layer in place, and counts what that did. The same in torch: sere_dist/method.
//
// A step is T tokens (rows) of K slots, each a weight and the id of one of E experts. A token's slots are neighbouring
// lanes of a warp: K rounded up to a power of two is the `width` of such a group.
//
//   1. vote        every valid token marks the experts of its slots: `chosen`, and `primary` in its S heaviest slots;
//                  where an expert has a price, its other slots say what they would lose without theirs: what loses
//                  as much in all becomes primary too
//   2. substitute  for each chosen expert: the first of its neighbours, in order of falling similarity, that is primary
//   3. settle      every token rewrites its slots and counts
//
// Up to 1,024 rows one block does it all (`reroute`). More rows take two launches over many blocks (`reroute_vote`,
// `reroute_settle`), which hand over the votes in a workspace that is all zero before and after. Between the two, other
// ranks' votes may be added; `chosen` stays this rank's own.
//
// Whatever a CUDA graph must not freeze is read from memory here: the settings, the tables, the rows' masks.
// Compiled by NVRTC through reroute.py, and by g++ against tests/support/cuda_on_host.h. No fused multiply-add: results equal
// torch's to the bit. Macros choose the types: IDS_64; one of BFLOAT16, FLOAT16 (default: float32).

constexpr int MAX_EXPERTS = 1024;
constexpr int MAX_THREADS = 1024;
constexpr int PREFETCHED = 8;  // experts a warp whose first 32 neighbours it loads before it needs them
constexpr unsigned ALL = 0xffffffffu;
constexpr unsigned short NO_SUBSTITUTE = 0xffff;
constexpr int NOWHERE = -1;

// A vote is a loss or a price as an integer: sums of votes do not depend on the order of threads.
typedef unsigned long long Count;
constexpr Count ALWAYS_PRIMARY = 1ull << 40;

#ifdef IDS_64
typedef long long Id;
#else
typedef int Id;
#endif

#if defined(BFLOAT16)
typedef unsigned short Weight;

__device__ float to_float(Weight bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

__device__ Weight to_weight(float value) {
    if (value != value) return 0x7fc0;
    unsigned bits = __float_as_uint(value);
    return static_cast<Weight>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#elif defined(FLOAT16)
typedef unsigned short Weight;

__device__ float to_float(Weight bits) {
    unsigned sign = static_cast<unsigned>(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 0x3ff;
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint(fraction * 0x1p-24f));
    return __uint_as_float(sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13);
}

__device__ Weight to_weight(float value) {
    unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<Weight>(sign | 0x7e00);
    if (magnitude >= 0x47800000) return static_cast<Weight>(sign | 0x7c00);  // 65536 and more
    if (magnitude < 0x38800000)  // subnormal: a multiple of 2^-24, rounded to even
        return static_cast<Weight>(sign | static_cast<unsigned>(rintf(__uint_as_float(magnitude) * 0x1p24f)));
    return static_cast<Weight>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
#else
typedef float Weight;

__device__ float to_float(Weight value) { return value; }
__device__ Weight to_weight(float value) { return value; }
#endif

// One per model, changed between steps; reroute.py writes it.
struct Settings {
    int on;
    int select_top_k;
    int least_rows, most_rows;  // valid rows of a step between which re-routing is on
    float traffic_price;
    Count loss_that_suffices;  // of an expert that has a price; ALWAYS_PRIMARY: it has none
};

enum Counter {  // COUNTERS of counters.py; of a pair, the second is AFTER
    STEPS, ROWS, REROUTED, CRITICAL, DROPPED, MERGED, ACTIVE, ACTIVE_AFTER, LARGEST_RANK, LARGEST_RANK_AFTER,
    DOMAINS, DOMAINS_AFTER, REMOTE_DOMAINS, REMOTE_DOMAINS_AFTER, REMOTE_SLOTS, REMOTE_SLOTS_AFTER, NUM_COUNTERS
};
enum When { BEFORE, AFTER };

// What the valid tokens of a step chose.
struct Votes {
    Count losses[MAX_EXPERTS];  // of the slots that are not their token's heaviest; all zero without a price
    unsigned char primary[MAX_EXPERTS], chosen[MAX_EXPERTS];
    int rows;
};

// What two launches share.
struct Workspace {
    Count votes[MAX_EXPERTS];  // ALWAYS_PRIMARY of every block that marked an expert primary, else its losses. Comes
                               // first: reroute.py shows it to other ranks
    unsigned char chosen[MAX_EXPERTS];
    unsigned char runs[MAX_EXPERTS];  // experts of valid tokens that are settled
    int rows;
    unsigned finished_blocks;
};

struct Experts {
    float size[MAX_EXPERTS];
    unsigned short substitute[MAX_EXPERTS];
    unsigned short place[MAX_EXPERTS];   // of the substitute among the neighbours
    unsigned short cutoff[MAX_EXPERTS];  // neighbours that are similar enough
    short domain[MAX_EXPERTS], rank[MAX_EXPERTS];
    int totals[NUM_COUNTERS];    // of the block's slots
    int active[2][MAX_EXPERTS];  // experts on each rank, before and after
};

// One step of one layer. A pointer marked ? may be null.
struct Step {
    Weight *weights_TK;
    Id *ids_TK;
    int T, K, E;
    const Settings *settings;
    const unsigned char *valid_T;         // ? all rows are valid
    const unsigned short *neighbors_EE;   // every row: all experts, the most similar first
    const unsigned short *cutoff_E;       // how many of them are similar enough
    const float *ranked_similarity_EE;    // in the order of the neighbors
    const float *coefficient_EE;          // ? with it the policy is projection, else the paper's
    const float *size_E;                  // ? goes with coefficient_EE
    const short *domain_E;                // ?
    const int *home_T;                    // ? -1: none
    const short *rank_E;                  // ? one rank holds all
    int num_ranks;                        // 0 without rank_E, at most MAX_EXPERTS
    int merges;                           // no token names an expert twice, and slots may be empty; else no slot that
                                          // the router filled is empty, and tokens may repeat an expert
    Count *counters;                      // one each, then one a rank: the experts that run there
    Workspace *workspace;
};

// All kernels take the members of Step, one by one: cuda.core passes no structs.
#define PARAMETERS                                                                                                \
    Weight *weights_TK, Id *ids_TK, int T, int K, int E, const Settings *settings, const unsigned char *valid_T,      \
        const unsigned short *neighbors_EE, const unsigned short *cutoff_E, const float *ranked_similarity_EE,    \
        const float *coefficient_EE, const float *size_E, const short *domain_E, const int *home_T,               \
        const short *rank_E, int num_ranks, int merges, Count *counters, Workspace *workspace
#define ARGUMENTS                                                                                                 \
    weights_TK, ids_TK, T, K, E, settings, valid_T, neighbors_EE, cutoff_E, ranked_similarity_EE, coefficient_EE,   \
        size_E, domain_E, home_T, rank_E, num_ranks, merges, counters, workspace

__device__ int warp_index() { return threadIdx.x / 32; }
__device__ int lane_index() { return threadIdx.x % 32; }
__device__ int group_width(int K) { return K == 1 ? 1 : 1 << (32 - __clz(K - 1)); }

// One lane's slot. Lanes without a token, an expert or a vote have expert -1.
struct Slot {
    int token, column;
    bool votes;  // the slot of a valid token
    int expert;
    float weight;
};

__device__ Slot read_slot(const Step &step, int token, int column) {
    Slot slot = {token, column, false, -1, 0.0f};
    if (token < step.T && column < step.K) {
        // Three loads at once: none waits for what another says.
        bool valid = !step.valid_T || step.valid_T[token];
        Id id = step.ids_TK[token * step.K + column];
        float weight = to_float(step.weights_TK[token * step.K + column]);
        slot.votes = valid;
        slot.expert = valid && id >= 0 && id < step.E ? static_cast<int>(id) : -1;
        slot.weight = valid ? weight : 0.0f;
    }
    return slot;
}

// The warp's first slots, asked for before they are needed.
__device__ Slot first_slot(const Step &step, int block) {
    int width = group_width(step.K), warps = blockDim.x / 32, lane = lane_index();
    return read_slot(step, (block * warps + warp_index()) * (32 / width) + lane / width, lane % width);
}

// How many of the token's slots come before this lane's: the heavier ones, and of equal ones those further left.
__device__ int rank_in_group(Slot slot, int K, int width) {
    // Weights as integers in the same order; like torch, -0 equals 0, and NaN comes first.
    unsigned bits = __float_as_uint(slot.weight + 0.0f);
    unsigned mine = slot.weight != slot.weight ? ALL : bits & 0x80000000 ? ~bits : bits | 0x80000000;
    int rank = 0;
#pragma unroll 4
    for (int column = 0; column < K; ++column) {
        unsigned other = __shfl_sync(ALL, mine, column, width);
        rank += (other > mine) | ((other == mine) & (column < slot.column));
    }
    return rank;
}

// Whether one of the group's lanes, or the home, has `domain` among the places that its token visits.
__device__ bool is_visited(int domain, int visits, int home, int K, int width) {
    bool visited = domain == home;
#pragma unroll 4
    for (int column = 0; column < K; ++column) visited |= __shfl_sync(ALL, visits, column, width) == domain;
    return visited;
}

// Whether an earlier slot of the token names the same expert, -1 being none. If this slot is the first of several,
// `weight` becomes the sum of all of them.
__device__ bool is_merged(int expert, int column, int K, int width, float &weight) {
    bool merged = false, repeated = false;
    float sum = 0.0f;
#pragma unroll 4
    for (int other = 0; other < K; ++other) {
        float its_weight = __shfl_sync(ALL, weight, other, width);
        bool same = __shfl_sync(ALL, expert, other, width) == expert && expert >= 0;
        sum += same ? its_weight : 0.0f;
        merged |= same && other < column;
        repeated |= same && other != column;
    }
    if (repeated) weight = sum;
    return merged;
}

// Counts the domain that this lane's slot visits, unless it is nowhere: once a token, and as remote unless it is home.
__device__ void count_visit(int visits, int home, int column, int K, int width, When when,
                            int (&counts)[NUM_COUNTERS]) {
    bool first = visits != NOWHERE, remote = visits != NOWHERE && visits != home;
#pragma unroll 4
    for (int other = 0; other < K; ++other)
        first &= (__shfl_sync(ALL, visits, other, width) != visits) | (other >= column);
    counts[DOMAINS + when] += first;
    counts[REMOTE_DOMAINS + when] += first && remote;
    counts[REMOTE_SLOTS + when] += remote;
}

// The loss with which an expert is primary: it has a price under policy projection alone.
__device__ Count loss_that_suffices(const Step &step, const Settings &settings) {
    return step.size_E ? settings.loss_that_suffices : ALWAYS_PRIMARY;
}

// 2^24 votes for a loss of 1; NaN has none.
__device__ Count votes_of_loss(float loss) {
    return static_cast<Count>(fminf(fmaxf(rintf(loss * 0x1p24f), 0.0f), static_cast<float>(ALWAYS_PRIMARY)));
}

__device__ void clear_votes(Votes &votes, int E) {
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        votes.losses[e] = 0;
        votes.primary[e] = votes.chosen[e] = 0;
    }
    if (threadIdx.x == 0) votes.rows = 0;
}

// Marks what the tokens of `blocks` blocks chose and, if `priced`, adds up what they would lose. Returns whether this
// thread marked a primary expert.
__device__ bool vote(const Step &step, int select_top_k, bool priced, Slot slot, Votes &votes, int block, int blocks) {
    int width = group_width(step.K), tokens = 32 / width, warps = blockDim.x / 32, lane = lane_index();
    int start = (block * warps + warp_index()) * tokens;
    int heaviest = select_top_k < step.K ? select_top_k : 0;  // S = K and more means off
    bool marked = false;
#pragma unroll 1
    for (int first = start; first < step.T; first += blocks * warps * tokens) {
        if (first != start) slot = read_slot(step, first + lane / width, lane % width);
        int rank = rank_in_group(slot, step.K, width);
        if (slot.expert >= 0) {
            votes.chosen[slot.expert] = 1;
            if (rank < heaviest)
                votes.primary[slot.expert] = marked = true;
            else if (priced && heaviest > 0)
                atomicAdd(&votes.losses[slot.expert],
                          votes_of_loss((slot.weight * slot.weight) * step.size_E[slot.expert]));
        }
        int rows = __popc(__ballot_sync(ALL, slot.votes && slot.column == 0));
        if (lane == 0 && rows) atomicAdd(&votes.rows, rows);
    }
    return marked;
}

// Marks the experts without which the tokens would lose enough. Returns whether this thread marked one.
__device__ bool mark_by_losses(Votes &votes, int E, Count enough) {
    bool marked = false;
    for (int e = threadIdx.x; e < E; e += blockDim.x)
        if (votes.losses[e] >= enough) votes.primary[e] = marked = true;
    return marked;
}

// By a warp: finds the substitute of one expert. `neighbor` is this lane's of the first 32.
__device__ void find_substitute(const Step &step, const Votes &votes, Experts &experts, int expert, int neighbor) {
    int lane = lane_index(), cutoff = votes.primary[expert] ? step.E : experts.cutoff[expert];
#pragma unroll 1
    for (int first = 0; first < cutoff; first += 32) {
        int place = first + lane;
        if (first) neighbor = place < step.E ? step.neighbors_EE[expert * step.E + place] : 0;
        unsigned found = __ballot_sync(ALL, place < cutoff && votes.primary[neighbor]);
        if (found) {
            if (place == first + __ffs(found) - 1) {
                experts.substitute[expert] = static_cast<unsigned short>(neighbor);
                experts.place[expert] = static_cast<unsigned short>(place);
            }
            return;
        }
    }
    if (lane == 0) experts.substitute[expert] = NO_SUBSTITUTE;
}

// Finds out for the tokens of a warp what each settling slot becomes: an expert, or -1 (drop). The slots of a token are
// settled in order of weight. Only two substitutes can be the cheapest: the most similar expert of all, and the most
// similar one in a domain that the token visits anyway, since costs rise as similarity falls.
__device__ int settle_by_price(const Step &step, const Settings &settings, const Votes &votes, const Experts &experts,
                               Slot slot, bool settles, int rank, int home, int &visits) {
    float price = settings.traffic_price;
    int width = group_width(step.K), lane = lane_index(), first_lane = lane / width * width;
    unsigned group = (width == 32 ? ALL : (1u << width) - 1) << first_lane;
    int substitute = settles ? experts.substitute[slot.expert] : -1;
    float similarity = settles ? step.ranked_similarity_EE[slot.expert * step.E + experts.place[slot.expert]] : 0.0f;
    float loss = settles ? (slot.weight * slot.weight) * experts.size[slot.expert] : 0.0f;
    if (!step.domain_E || !(price > 0)) return loss < loss * (1 - similarity) ? -1 : substitute;

    int outcome = substitute;
#pragma unroll 1
    for (int turn = settings.select_top_k; turn < step.K; ++turn) {
        unsigned ready = __ballot_sync(ALL, settles && rank == turn);
        if (!ready) continue;
        bool active = ready & group;  // else this token's slot of the turn stays as it is
        int from = active ? __ffs(ready & group) - 1 : lane;
        int expert = __shfl_sync(ALL, slot.expert, from);
        int choice = __shfl_sync(ALL, substitute, from);
        float choice_similarity = __shfl_sync(ALL, similarity, from), whole = __shfl_sync(ALL, loss, from);
        int domain = active ? experts.domain[choice] : NOWHERE;
        bool visited = is_visited(domain, visits, home, step.K, width);
        float least = whole * (1 - choice_similarity) + (visited ? 0.0f : price);

        bool searching = active && !visited;
#pragma unroll 1
        for (int first = 0; __ballot_sync(ALL, searching); first += width) {
            int place = first + lane - first_lane;
            searching &= first < step.E;
            int neighbor = searching && place < step.E ? step.neighbors_EE[expert * step.E + place] : -1;
            bool near = is_visited(neighbor >= 0 ? experts.domain[neighbor] : NOWHERE - 1, visits, home, step.K, width);
            unsigned found = __ballot_sync(ALL, neighbor >= 0 && near && votes.primary[neighbor]) & group;
            int nearest = __shfl_sync(ALL, neighbor, found ? __ffs(found) - 1 : lane);
            if (searching && found) {
                int its_place = first + __ffs(found) - 1 - first_lane;
                float cost = whole * (1 - step.ranked_similarity_EE[expert * step.E + its_place]);
                // Of equal costs the larger similarity wins, then the lower id: the choice so far came first.
                if (cost < least) {
                    least = cost;
                    choice = nearest;
                }
                searching = false;
            }
        }
        if (whole < least) choice = -1;
        if (active && lane == from) {
            outcome = choice;
            if (choice >= 0) visits = experts.domain[choice];
        }
    }
    return outcome;
}

__device__ void load_experts(const Step &step, Experts &experts) {
    for (int e = threadIdx.x; e < step.E; e += blockDim.x) {
        experts.cutoff[e] = step.cutoff_E[e];
        if (step.size_E) experts.size[e] = step.size_E[e];
        if (step.domain_E) experts.domain[e] = step.domain_E[e];
        if (step.rank_E) experts.rank[e] = step.rank_E[e];
    }
    if (threadIdx.x < NUM_COUNTERS) experts.totals[threadIdx.x] = 0;
    for (int rank = threadIdx.x; rank < max(step.num_ranks, 1); rank += blockDim.x)
        experts.active[BEFORE][rank] = experts.active[AFTER][rank] = 0;
}

// The first neighbours of this warp's first experts, asked for before they are needed.
__device__ void prefetch(const Step &step, int (&neighbors)[PREFETCHED]) {
#pragma unroll
    for (int i = 0; i < PREFETCHED; ++i) {
        int expert = warp_index() + i * (blockDim.x / 32), lane = lane_index();
        neighbors[i] = expert < step.E && lane < step.E ? step.neighbors_EE[expert * step.E + lane] : 0;
    }
}

__device__ void find_substitutes(const Step &step, const Votes &votes, Experts &experts,
                                 const int (&neighbors)[PREFETCHED]) {
    int warps = blockDim.x / 32, lane = lane_index();
#pragma unroll 1
    for (int expert = warp_index(), turn = 0; expert < step.E; expert += warps, ++turn) {
        if (!votes.chosen[expert]) continue;
        if (!step.coefficient_EE && votes.primary[expert]) continue;  // it stays
        int neighbor = 0;
        if (turn >= PREFETCHED && lane < step.E) neighbor = step.neighbors_EE[expert * step.E + lane];
#pragma unroll
        for (int i = 0; i < PREFETCHED; ++i) neighbor = turn == i ? neighbors[i] : neighbor;  // stays in registers
        find_substitute(step, votes, experts, expert, neighbor);
    }
}

// Rewrites the slots of the block's tokens. `acts`: re-routing is on in this step; then `runs`, unless it is null, gets
// the marks of their experts.
__device__ void settle_slots(const Step &step, const Settings &settings, Slot slot, const Votes &votes,
                             const Experts &experts, bool acts, unsigned char *runs, int block, int blocks,
                             int (&counts)[NUM_COUNTERS]) {
    int width = group_width(step.K), tokens = 32 / width, warps = blockDim.x / 32, lane = lane_index();
    int start = (block * warps + warp_index()) * tokens;
    bool priced = step.coefficient_EE;
#pragma unroll 1
    for (int first = start; first < step.T; first += blocks * warps * tokens) {
        if (first != start) slot = read_slot(step, first + lane / width, lane % width);
        // Lanes beyond the token's slots need its home too: they search for it.
        int home = step.home_T && slot.token < step.T ? step.home_T[slot.token] : NOWHERE;
        int visits = step.domain_E && slot.expert >= 0 ? experts.domain[slot.expert] : NOWHERE;
        if (step.domain_E) count_visit(visits, home, slot.column, step.K, width, BEFORE, counts);
        if (acts) {
            int rank = priced ? rank_in_group(slot, step.K, width) : 0;
            bool settles = slot.expert >= 0 && (priced ? rank >= settings.select_top_k : !votes.primary[slot.expert]);
            bool critical = settles && experts.substitute[slot.expert] == NO_SUBSTITUTE;
            settles &= !critical;
            int outcome = settles ? experts.substitute[slot.expert] : slot.expert;
            if (priced) {
                int kept = settles ? NOWHERE : visits;
                int cheapest = settle_by_price(step, settings, votes, experts, slot, settles, rank, home, kept);
                if (settles) outcome = cheapest;
            }
            if (runs && outcome >= 0) runs[outcome] = 1;
            counts[REROUTED] += outcome != slot.expert && outcome >= 0;
            counts[DROPPED] += outcome != slot.expert && outcome < 0;
            counts[CRITICAL] += critical;

            float weight = slot.weight;
            if (priced && outcome != slot.expert) {
                float scaled = outcome < 0 ? 0.0f : weight * step.coefficient_EE[slot.expert * step.E + outcome];
                weight = to_float(to_weight(scaled));
            }
            int fills = -1;  // a slot that no expert computes
            if (step.merges && is_merged(outcome, slot.column, step.K, width, weight)) {
                outcome = -1;
                weight = 0.0f;
                ++counts[MERGED];
            }
            if (priced && !step.merges) {
                unsigned first = __ballot_sync(ALL, rank == 0 && slot.column < step.K) >> lane / width * width;
                fills = __shfl_sync(ALL, slot.expert, __ffs(first) - 1, width);
            }
            int at = slot.token * step.K + slot.column;
            if (outcome != slot.expert) step.ids_TK[at] = outcome < 0 ? fills : outcome;
            if (weight != slot.weight) step.weights_TK[at] = to_weight(weight);
            visits = step.domain_E && outcome >= 0 ? experts.domain[outcome] : NOWHERE;
        }
        if (step.domain_E) count_visit(visits, home, slot.column, step.K, width, AFTER, counts);
    }
}

// Whether re-routing is on in this step.
__device__ bool is_on(const Settings &settings, const Votes &votes, bool any_primary, int K) {
    return settings.on && any_primary && 0 < settings.select_top_k && settings.select_top_k < K &&
           settings.least_rows <= votes.rows && votes.rows <= settings.most_rows;
}

// Settles and counts the slots of the block's tokens; the totals are complete after a barrier. `votes` and `experts`
// are the block's own, in shared memory; `slot` is its first.
__device__ void settle(const Step &step, const Settings &settings, Slot slot, const Votes &votes, Experts &experts,
                       const int (&neighbors)[PREFETCHED], bool acts, unsigned char *runs, int block, int blocks) {
    if (acts) {  // all threads, or none
        find_substitutes(step, votes, experts, neighbors);
        __syncthreads();
    }
    int counts[NUM_COUNTERS] = {};
    if (acts || step.domain_E) settle_slots(step, settings, slot, votes, experts, acts, runs, block, blocks, counts);
    if (block == 0 && threadIdx.x == 0) experts.totals[STEPS] = 1, experts.totals[ROWS] = votes.rows;
#pragma unroll
    for (int i = REROUTED; i < NUM_COUNTERS; ++i) {
        if (ACTIVE <= i && i <= LARGEST_RANK_AFTER) continue;  // count_experts
        if (i == DROPPED && !step.coefficient_EE) continue;
        if (i == MERGED && !step.merges) continue;
        if (i >= DOMAINS && !step.domain_E) continue;
        int sum = __reduce_add_sync(ALL, counts[i]);
        if (lane_index() == 0 && sum) atomicAdd(&experts.totals[i], sum);
    }
}

// Counts the experts that valid tokens chose, and those that run in the end. Where all that is primary is in a heaviest
// slot of this rank's, `runs` may be null: what was chosen then runs if it is primary or has no substitute, and nothing
// else does.
__device__ void count_experts(const Step &step, const Votes &votes, Experts &experts, bool acts,
                              const unsigned char *runs) {
#pragma unroll 1
    for (int first = warp_index() * 32; first < step.E; first += blockDim.x) {
        int e = first + lane_index();
        bool chosen = e < step.E && votes.chosen[e], stays = chosen;
        if (acts && runs)
            stays = e < step.E && runs[e];
        else if (acts && chosen)
            stays = votes.primary[e] || experts.substitute[e] == NO_SUBSTITUTE;
        if (step.rank_E) {
            unsigned rank = e < step.E ? experts.rank[e] : 0;
            bool known = rank < static_cast<unsigned>(step.num_ranks);  // else it would be written beyond the array
            if (known && chosen) atomicAdd(&experts.active[BEFORE][rank], 1);
            if (known && stays) atomicAdd(&experts.active[AFTER][rank], 1);
        } else {
            int before = __popc(__ballot_sync(ALL, chosen)), after = __popc(__ballot_sync(ALL, stays));
            if (lane_index() == 0) atomicAdd(&experts.active[BEFORE][0], before);
            if (lane_index() == 0) atomicAdd(&experts.active[AFTER][0], after);
        }
    }
}

// What a block counted goes to the layer's counters, after a barrier.
__device__ void add(const Step &step, int counter, int count) {
    if (count) atomicAdd(&step.counters[counter], static_cast<Count>(count));
}

__device__ void add_experts(const Step &step, const Experts &experts) {
    if (warp_index() != 0) return;
#pragma unroll
    for (int when = BEFORE; when <= AFTER; ++when) {
        int sum = 0, most = 0;
#pragma unroll 1
        for (int rank = lane_index(); rank < max(step.num_ranks, 1); rank += 32) {
            int active = experts.active[when][rank];
            sum += active;
            most = max(most, active);
            if (when == AFTER && step.rank_E) add(step, NUM_COUNTERS + rank, active);
        }
        sum = __reduce_add_sync(ALL, sum);
        most = __reduce_max_sync(ALL, most);
        if (lane_index() == 0) add(step, ACTIVE + when, sum), add(step, LARGEST_RANK + when, most);
    }
}

__device__ void add_slots(const Step &step, const Experts &experts) {
    if (threadIdx.x < NUM_COUNTERS) add(step, threadIdx.x, experts.totals[threadIdx.x]);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS) reroute(PARAMETERS) {
    __shared__ Votes votes;
    __shared__ Experts experts;
    __shared__ unsigned char runs[MAX_EXPERTS];
    const Step step = {ARGUMENTS};
    const Settings now = *settings;
    const Slot slot = first_slot(step, 0);
    int neighbors[PREFETCHED];
    prefetch(step, neighbors);
    load_experts(step, experts);
    clear_votes(votes, E);
    for (int e = threadIdx.x; e < E; e += blockDim.x) runs[e] = 0;
    __syncthreads();
    const Count enough = loss_that_suffices(step, now);
    const bool priced = enough < ALWAYS_PRIMARY;  // of all threads, or none
    bool marked = vote(step, now.select_top_k, priced, slot, votes, 0, 1);
    if (priced) {
        __syncthreads();
        marked |= mark_by_losses(votes, E, enough);
    }
    bool any_primary = __syncthreads_or(marked);
    if (votes.rows == 0) return;  // all threads
    bool acts = is_on(now, votes, any_primary, K);
    settle(step, now, slot, votes, experts, neighbors, acts, priced ? runs : nullptr, 0, 1);
    if (priced) __syncthreads();  // what runs is marked
    count_experts(step, votes, experts, acts, priced ? runs : nullptr);
    __syncthreads();
    add_slots(step, experts);
    add_experts(step, experts);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS) reroute_vote(PARAMETERS) {
    __shared__ Votes votes;
    const Step step = {ARGUMENTS};
    const Slot slot = first_slot(step, blockIdx.x);
    clear_votes(votes, E);
    __syncthreads();
    const bool priced = loss_that_suffices(step, *settings) < ALWAYS_PRIMARY;
    vote(step, settings->select_top_k, priced, slot, votes, blockIdx.x, gridDim.x);
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        Count said = votes.primary[e] ? ALWAYS_PRIMARY : votes.losses[e];
        if (said) atomicAdd(&workspace->votes[e], said);
        if (votes.chosen[e]) workspace->chosen[e] = 1;
    }
    if (threadIdx.x == 0 && votes.rows) atomicAdd(&workspace->rows, votes.rows);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS) reroute_settle(PARAMETERS) {
    __shared__ Votes votes;
    __shared__ Experts experts;
    __shared__ bool is_last;
    const Step step = {ARGUMENTS};
    const Settings now = *settings;
    const Slot slot = first_slot(step, blockIdx.x);
    int neighbors[PREFETCHED];
    prefetch(step, neighbors);
    load_experts(step, experts);
    const Count enough = loss_that_suffices(step, now);
    bool marked = false;
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        marked |= votes.primary[e] = workspace->votes[e] >= enough;
        votes.chosen[e] = workspace->chosen[e];
    }
    if (threadIdx.x == 0) votes.rows = workspace->rows;
    bool any_primary = __syncthreads_or(marked);
    bool acts = votes.rows > 0 && is_on(now, votes, any_primary, K);
    if (votes.rows > 0) {  // all threads, or none
        settle(step, now, slot, votes, experts, neighbors, acts, workspace->runs, blockIdx.x, gridDim.x);
        __threadfence();  // who sees that the block has finished also sees its marks
        __syncthreads();
        add_slots(step, experts);
    }

    // All blocks have read the votes and marked what runs once the last one gets here: it counts that, and leaves zeros
    // for the next step.
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&workspace->finished_blocks, 1u) == gridDim.x - 1;
        __threadfence();  // and here it is seen before the others' marks are read
    }
    __syncthreads();
    if (!is_last) return;
    count_experts(step, votes, experts, acts, workspace->runs);
    __syncthreads();
    add_experts(step, experts);
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        workspace->votes[e] = 0;
        workspace->chosen[e] = workspace->runs[e] = 0;
    }
    if (threadIdx.x == 0) workspace->rows = 0, workspace->finished_blocks = 0;
}
