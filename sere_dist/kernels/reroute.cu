// Re-routes one step of one MoE layer in place, and counts what that did. The same in torch: sere_dist/method.
//
// A step is T tokens (rows) of K slots, each a weight and the id of one of E experts. Every thread has one slot. A
// token's slots are neighbouring lanes of a warp: K rounded up to a power of two is the `width` of such a group.
//
//   1. vote        every valid token marks the experts of its slots: `chosen`, and `primary` in its S heaviest slots;
//                  where an expert has a price, its other slots say what they would lose without theirs, and what is
//                  worth its price becomes primary too
//   2. substitute  for each chosen expert: the first of its neighbours, in order of falling similarity, that is primary
//   3. settle      every token rewrites its slots, and counts
//
// Where a block has a thread for every lane, it does it all (`reroute`). Other steps take two launches over many blocks
// (`reroute_vote`, `reroute_settle`), which hand over the votes in a workspace that is all zero before and after. Between
// the two, other ranks' votes may be added; `chosen` stays this rank's own. No block has fewer threads than experts.
//
// Whatever a CUDA graph must not freeze is read from memory here: the settings, the tables, the rows' masks. What a layer
// never changes is a constant: reroute.py has NVRTC compile this file for its EXPERTS, TOP_K and FEATURES. Without them one
// build serves all layers; so most tests have g++ compile it, against tests/support/cuda_on_host.h. No fused multiply-add:
// results equal torch's to the bit.

#ifndef EXPERTS_A_WARP
#define EXPERTS_A_WARP 8  // whose substitutes a warp looks up at once
#endif
#ifdef EXPERTS
constexpr int MAX_EXPERTS = EXPERTS;
#else
constexpr int MAX_EXPERTS = 1024;
#endif
constexpr int MAX_RANKS = 1024;
constexpr int MAX_THREADS = 1024;
constexpr unsigned ALL = 0xffffffffu;
constexpr unsigned short NO_SUBSTITUTE = 0xffff;
constexpr int NOWHERE = -1;

// A loss or a price as an integer: sums do not depend on the order of threads.
typedef unsigned long long Count;
constexpr Count ALWAYS_PRIMARY = 1ull << 40;
constexpr float FIRST = 3e38f;  // comes before what any expert may lose
constexpr int LOW_BITS = 20;  // low bits and the rest of a slot's loss are at most 2^20: a block's slots fit in 32 bits

#ifdef IDS_64
typedef long long Id;
#else
typedef int Id;
#endif

// Of a layer: Feature of reroute.py.
enum Feature {
    PROJECTION = 1,  // the policy, else the paper's
    DOMAINS = 2,     // experts live in domains, and tokens may have a home
    RANKS = 4,       // experts live on ranks, else one rank holds all
    MERGES = 8,      // no token names an expert twice, and slots may be empty; else no slot that the router filled is
                     // empty, and tokens may repeat an expert
    CHANCES = 16     // of PROJECTION: tokens whose output may not be used, drafts, count by the chance that it is
};

// Changed between steps; reroute.py writes it.
struct Settings {
    int on;
    int select_top_k;
    int least_rows, most_rows;  // valid rows of a step between which re-routing is on
    float traffic_price;
    Count expert_price;   // in the unit of losses; 0: none
    Count balance_price;  // of RANKS; 0: none
};

enum Counter {  // COUNTERS of counters.py; of a pair, the second is AFTER
    STEPS, ROWS, REROUTED, CRITICAL, DROPPED, MERGED, ACTIVE, ACTIVE_AFTER, LARGEST_RANK, LARGEST_RANK_AFTER,
    DOMAINS_VISITED, DOMAINS_AFTER, REMOTE_DOMAINS, REMOTE_DOMAINS_AFTER, REMOTE_SLOTS, REMOTE_SLOTS_AFTER,
    ESTIMATED_ERROR, NUM_COUNTERS
};
enum When { BEFORE, AFTER };

// What two launches share.
struct Workspace {
    Count votes[MAX_EXPERTS];  // ALWAYS_PRIMARY of every block that marked an expert primary, else its losses. Comes
                               // first: reroute.py shows it to other ranks
    unsigned char chosen[MAX_EXPERTS];
    unsigned char runs[MAX_EXPERTS];  // experts of valid tokens that are settled
    int rows;
    unsigned finished_blocks;
};

// One step of one layer: StepArguments of reroute.py. A pointer marked ? may be null.
struct Step {
    float *weights_TK;
    Id *ids_TK;
    const unsigned char *valid_T;         // ? all rows are valid
    const int *home_T;                    // ? -1: none
    const float *chance_T;                // of CHANCES
    const unsigned char *runs_T;          // ? of PROJECTION: other rows, whose experts run all the same
    const Settings *settings;
    const unsigned short *neighbors_EE;   // every row: all experts, the most similar first. Never changes; further rows
                                          // make it a multiple of 32
    const unsigned short *cutoff_E;       // how many of them are similar enough
    const float *ranked_similarity_EE;    // in the order of the neighbors
    const float *coefficient_EE, *size_E; // of PROJECTION
    const short *domain_E;                // of DOMAINS
    const short *rank_E;                  // of RANKS
    Count *counters;                      // one each, then one a rank: the experts that run there
    Workspace *workspace;
    int T, K, E, num_ranks, features;
};

__device__ bool has(const Step &step, Feature feature) { return step.features & feature; }

// The step, with what this file was compiled for as constants.
__device__ Step with_constants(Step step) {
#ifdef EXPERTS
    step.E = EXPERTS, step.K = TOP_K, step.features = FEATURES;
#endif
    return step;
}

// What the threads of a block share.
struct Block {
    Settings settings;
    int rows;                    // that are valid
    unsigned char primary[MAX_EXPERTS], chosen[MAX_EXPERTS], runs[MAX_EXPERTS];
    unsigned low_loss[MAX_EXPERTS], high_loss[MAX_EXPERTS];  // of the slots that are not their token's heaviest
    float left[MAX_EXPERTS];             // of the losses of all blocks and ranks, after the best substitution so far
    unsigned short substitute[MAX_EXPERTS];
    unsigned short place[MAX_EXPERTS];   // of the substitute among the neighbours
    unsigned short cutoff[MAX_EXPERTS];
    float size[MAX_EXPERTS];
    short domain[MAX_EXPERTS], rank[MAX_EXPERTS];
    int totals[NUM_COUNTERS];    // of the block's slots
    unsigned low_error, high_error;  // that their changes are estimated to make
    int active[2][MAX_RANKS];    // experts on each rank, before and after
    bool is_last;
};

// One thread's slot. Threads without a token, an expert or a vote have expert -1.
struct Slot {
    int token, column;
    bool votes;  // the slot of a valid token
    int expert;
    int runs;    // the expert of another row that runs all the same, or -1
    float weight, chance;
    int home;
    int place;  // how many of the token's slots come before it: the heavier ones, and of equal ones those further left
};

__device__ int warp_index() { return threadIdx.x / 32; }
__device__ int lane_index() { return threadIdx.x % 32; }
__device__ unsigned group_width(int K) { return K == 1 ? 1 : 1u << (32 - __clz(K - 1)); }

// Since sm_90 a kernel may start while the one before it in the stream still runs, if both allow it.
__device__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ void wait_for_last_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether one of the warp's threads has a slot.
__device__ bool has_tokens(const Step &step) {
    return (blockIdx.x * blockDim.x + threadIdx.x - lane_index()) / group_width(step.K) < step.T;
}

// A lane's of the first 32 neighbours of EXPERTS_A_WARP experts, from `first` on.
struct Neighbors {
    int first;
    int ids[EXPERTS_A_WARP];
};

__device__ void load(const Step &step, int first, Neighbors &neighbors) {
    int lane = lane_index();
    neighbors.first = first;
#pragma unroll
    for (int i = 0; i < EXPERTS_A_WARP; ++i) neighbors.ids[i] = 0;
    if (first >= step.E || lane >= step.E) return;
#pragma unroll
    for (int i = 0; i < EXPERTS_A_WARP; ++i) neighbors.ids[i] = step.neighbors_EE[(first + i) * step.E + lane];
}

// Begins a step: returns this thread's slot, and fills what the block shares; a barrier later it may be read. All loads
// are asked for before one of them is used: the neighbours before the wait for the last kernel, the others after it.
__device__ Slot begin(const Step &step, Block &block, Neighbors &neighbors) {
    unsigned width = group_width(step.K), thread = blockIdx.x * blockDim.x + threadIdx.x;
    int e = threadIdx.x;
    load(step, warp_index() * EXPERTS_A_WARP, neighbors);
    wait_for_last_kernel();

    Slot slot = {static_cast<int>(thread / width), static_cast<int>(thread % width), false, -1, -1, 0.0f, 1.0f, NOWHERE, 0};
    Id id = -1;
    float weight = 0.0f;
    bool has_token = slot.token < step.T, runs = false;
    if (has_token) slot.votes = !step.valid_T || step.valid_T[slot.token];
    if (has_token && has(step, PROJECTION) && step.runs_T) runs = step.runs_T[slot.token];
    if (has_token && has(step, CHANCES)) slot.chance = step.chance_T[slot.token];
    if (has_token && has(step, DOMAINS) && step.home_T) slot.home = step.home_T[slot.token];
    if (has_token && slot.column < step.K) {
        id = step.ids_TK[slot.token * step.K + slot.column];
        weight = step.weights_TK[slot.token * step.K + slot.column];
    }
    if (e < step.E) {
        block.cutoff[e] = step.cutoff_E[e];
        if (has(step, PROJECTION)) block.size[e] = step.size_E[e], block.low_loss[e] = block.high_loss[e] = 0;
        if (has(step, DOMAINS)) block.domain[e] = step.domain_E[e];
        if (has(step, RANKS)) block.rank[e] = step.rank_E[e];
        block.primary[e] = block.chosen[e] = block.runs[e] = 0;
        block.substitute[e] = NO_SUBSTITUTE;
    }
    if (e < NUM_COUNTERS) block.totals[e] = 0;
    if (has(step, RANKS))
        for (int rank = e; rank < step.num_ranks; rank += blockDim.x)
            block.active[BEFORE][rank] = block.active[AFTER][rank] = 0;
    if (e == 0) block.settings = *step.settings, block.rows = 0;
    if (has(step, PROJECTION) && e == 0) block.low_error = block.high_error = 0;

    if (runs && id >= 0 && id < step.E) slot.runs = static_cast<int>(id);
    slot.votes &= slot.column < step.K;
    if (slot.votes) {
        slot.expert = id >= 0 && id < step.E ? static_cast<int>(id) : -1;
        slot.weight = weight;
    }
    return slot;
}

__device__ int place_in_token(const Slot &slot, int K) {
    // Weights as integers in the same order; like torch, -0 equals 0, and NaN comes first.
    unsigned bits = __float_as_uint(slot.weight + 0.0f);
    unsigned mine = slot.weight != slot.weight ? ALL : bits & 0x80000000 ? ~bits : bits | 0x80000000;
    int place = 0;
#pragma unroll 16
    for (int column = 0; column < K; ++column) {
        unsigned other = __shfl_sync(ALL, mine, column, group_width(K));
        place += (other > mine) | ((other == mine) & (column < slot.column));
    }
    return place;
}

// Whether one of the group's lanes, or the home, has `domain` among the places that its token visits.
__device__ bool is_visited(int domain, int visits, int home, int K) {
    bool visited = domain == home;
#pragma unroll 16
    for (int column = 0; column < K; ++column) visited |= __shfl_sync(ALL, visits, column, group_width(K)) == domain;
    return visited;
}

// Whether an earlier slot of the token names the same expert, -1 being none. If this slot is the first of several,
// `weight` becomes the sum of all of them.
__device__ bool is_merged(int expert, int column, int K, float &weight) {
    bool merged = false, repeated = false;
    float sum = 0.0f;
#pragma unroll 16
    for (int other = 0; other < K; ++other) {
        float its_weight = __shfl_sync(ALL, weight, other, group_width(K));
        bool same = __shfl_sync(ALL, expert, other, group_width(K)) == expert && expert >= 0;
        sum += same ? its_weight : 0.0f;
        merged |= same && other < column;
        repeated |= same && other != column;
    }
    if (repeated) weight = sum;
    return merged;
}

// Counts the domain that this lane's slot visits, unless it is nowhere: once a token, and as remote unless it is home.
__device__ void count_visit(int visits, const Slot &slot, int K, When when, int (&counts)[NUM_COUNTERS]) {
    bool first = visits != NOWHERE, remote = visits != NOWHERE && visits != slot.home;
#pragma unroll 16
    for (int other = 0; other < K; ++other)
        first &= (__shfl_sync(ALL, visits, other, group_width(K)) != visits) | (other >= slot.column);
    counts[DOMAINS_VISITED + when] += first;
    counts[REMOTE_DOMAINS + when] += first && remote;
    counts[REMOTE_SLOTS + when] += remote;
}

// What one more expert on the rank with most costs; 0: ranks do not matter.
__device__ Count price_of_a_place(const Step &step, const Block &block) {
    return has(step, PROJECTION) && has(step, RANKS) ? block.settings.balance_price : 0;
}

// What an expert in no heaviest slot must be worth to become primary; 0: it can't. It has a price under policy projection
// alone, and where a place has one, any expert may be worth it.
__device__ Count price_of_an_expert(const Step &step, const Block &block) {
    if (!has(step, PROJECTION)) return 0;
    if (block.settings.expert_price) return block.settings.expert_price;
    return price_of_a_place(step, block) ? 1 : 0;
}

// Whether S and the prices may change a token.
__device__ bool in_force(const Step &step, const Block &block) {
    int S = block.settings.select_top_k;
    return S == 0 ? price_of_an_expert(step, block) > 0 : 0 < S && S < step.K;
}

// A loss times the chance that the token's output is used: 2^24 for 1; 0 for NaN.
__device__ Count loss_as_integer(const Step &step, const Slot &slot, float loss) {
    if (has(step, CHANCES)) loss *= slot.chance;
    return static_cast<Count>(fminf(fmaxf(rintf(loss * 0x1p24f), 0.0f), static_cast<float>(ALWAYS_PRIMARY)));
}

__device__ Count joined(unsigned high, unsigned low) { return (static_cast<Count>(high) << LOW_BITS) + low; }
__device__ unsigned low_part(Count loss) { return static_cast<unsigned>(loss) & ((1u << LOW_BITS) - 1); }
__device__ unsigned high_part(Count loss) { return static_cast<unsigned>(loss >> LOW_BITS); }

__device__ Count loss_of(const Block &block, int expert) {
    return joined(block.high_loss[expert], block.low_loss[expert]);
}

// Places the slot among its token's, marks what its token chose, and adds what it would lose. Returns whether it marked a
// primary expert.
__device__ bool vote(const Step &step, Block &block, Slot &slot) {
    if (!has_tokens(step)) return false;
    slot.place = place_in_token(slot, step.K);
    bool acts = in_force(step, block), marks = acts && slot.expert >= 0 && slot.place < block.settings.select_top_k;
    if (slot.expert >= 0) block.chosen[slot.expert] = 1;
    if (marks) block.primary[slot.expert] = 1;
    if (has(step, PROJECTION) && slot.runs >= 0 && acts) block.primary[slot.runs] = marks = true;
    if (price_of_an_expert(step, block) && slot.expert >= 0 && !marks && acts) {
        Count loss = loss_as_integer(step, slot, (slot.weight * slot.weight) * block.size[slot.expert]);
        atomicAdd(&block.low_loss[slot.expert], low_part(loss));
        atomicAdd(&block.high_loss[slot.expert], high_part(loss));
    }
    int rows = __popc(__ballot_sync(ALL, slot.votes && slot.column == 0));
    if (lane_index() == 0 && rows) atomicAdd(&block.rows, rows);
    return marks;
}

// Whether re-routing is on in this step.
__device__ bool is_on(const Step &step, const Block &block, bool any_primary) {
    const Settings &now = block.settings;
    return now.on && any_primary && in_force(step, block) && now.least_rows <= block.rows && block.rows <= now.most_rows;
}

// For whom experts look for a substitute.
enum Search {
    TO_SETTLE,  // those that a token chose, among the primary ones
    TO_BUY,     // those that lose as much as they cost, among the primary ones
    IN_ORDER    // those of which as much is left, among the ones before them
};

// How many of its neighbours may stand in for an expert: 0 where none is looked for.
__device__ int neighbors_to_ask(const Step &step, const Block &block, int expert, Search search) {
    bool primary = block.primary[expert];
    if (search != TO_SETTLE)
        return !primary && block.left[expert] >= static_cast<float>(price_of_an_expert(step, block)) ? step.E : 0;
    if (!block.chosen[expert]) return 0;
    // A primary expert is its own substitute, which the paper's policy need not look up.
    return !primary ? block.cutoff[expert] : has(step, PROJECTION) ? step.E : 0;
}

// Whether more is left of the loss without `other`; of equal ones the lower id comes first.
__device__ bool comes_before(const Block &block, int other, int expert) {
    float its = block.left[other], own = block.left[expert];
    return its > own || (its == own && other < expert);
}

__device__ bool may_stand_in(const Block &block, int neighbor, int expert, Search search) {
    return search == IN_ORDER ? comes_before(block, neighbor, expert) : block.primary[neighbor];
}

// By a warp: whether one of its lanes' neighbours, which are at `place`, may stand in. The first is the substitute.
__device__ bool is_found(Block &block, int expert, int neighbor, int place, int within, Search search) {
    unsigned found = __ballot_sync(ALL, place < within && may_stand_in(block, neighbor, expert, search));
    if (found && lane_index() == __ffs(found) - 1) {
        block.substitute[expert] = static_cast<unsigned short>(neighbor);
        block.place[expert] = static_cast<unsigned short>(place);
    }
    return found;
}

// By a warp: looks for a substitute beyond the first 32 neighbours, 128 at a time.
__device__ void search_on(const Step &step, Block &block, int expert, int within, Search search) {
#pragma unroll 1
    for (int first = 32; first < within; first += 128) {
        int neighbors[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int place = first + 32 * i + lane_index();
            neighbors[i] = place < within ? step.neighbors_EE[expert * step.E + place] : 0;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (is_found(block, expert, neighbors[i], first + 32 * i + lane_index(), within, search)) return;
    }
}

// By all warps: finds the substitutes of experts. `neighbors` are those of this warp's first ones.
__device__ void find_substitutes(const Step &step, Block &block, Neighbors &neighbors, Search search) {
    int lane = lane_index();
#pragma unroll 1
    for (int first = warp_index() * EXPERTS_A_WARP; first < step.E; first += blockDim.x / 32 * EXPERTS_A_WARP) {
        if (first != neighbors.first) load(step, first, neighbors);
        int mine = first + lane, within = 0;
        if (lane < EXPERTS_A_WARP && mine < step.E) within = neighbors_to_ask(step, block, mine, search);
        unsigned open = __ballot_sync(ALL, within > 0);
        if (!open) continue;
#pragma unroll
        for (int i = 0; i < EXPERTS_A_WARP; ++i) {
            int ask = __shfl_sync(ALL, within, i);
            if (is_found(block, first + i, neighbors.ids[i], lane, ask, search)) open &= ~(1u << i);
        }
#pragma unroll 1
        for (; open; open &= open - 1) {
            int i = __ffs(open) - 1;
            search_on(step, block, first + i, __shfl_sync(ALL, within, i), search);
        }
    }
}

// By all threads: whether this thread's expert, worth so much, is worth its place on its rank: balance.py.
__device__ bool is_worth_its_place(const Step &step, Block &block, Count worth, Count expert_price, bool must) {
    int e = threadIdx.x, place = 0;
    bool wanted = must || worth >= expert_price;  // a thread without an expert is worth 0
    if (e < step.E) {
        block.low_loss[e] = block.high_loss[e] = 0;  // from here on, what a place is worth
        block.left[e] = must ? FIRST : wanted ? static_cast<float>(worth) : -1.0f;
    }
    __syncthreads();
    if (wanted) {
#pragma unroll 4
        for (int other = 0; other < step.E; ++other)
            place += block.rank[other] == block.rank[e] && comes_before(block, other, e);
        Count gain = must ? ALWAYS_PRIMARY : worth - expert_price;
        atomicAdd(&block.low_loss[place], low_part(gain));
        atomicAdd(&block.high_loss[place], high_part(gain));
    }
    __syncthreads();
    return wanted && (place == 0 || loss_of(block, place) >= price_of_a_place(step, block));
}

// Makes the experts primary that are worth the prices, each thread's own one by its loss. Returns whether the thread made
// one primary. All threads see the marks a barrier later.
__device__ bool buy(const Step &step, Block &block, Neighbors &neighbors, Count loss_of_own) {
    int e = threadIdx.x;
    Count price = price_of_an_expert(step, block), worth = 0;
    bool has_expert = e < step.E, must = has_expert && (block.primary[e] || loss_of_own >= ALWAYS_PRIMARY);
    float loss = static_cast<float>(loss_of_own);
    if (has_expert) block.primary[e] = must, block.left[e] = must ? FIRST : loss;
#pragma unroll 1
    for (int turn = TO_BUY; turn <= IN_ORDER; ++turn) {
        __syncthreads();
        find_substitutes(step, block, neighbors, static_cast<Search>(turn));
        __syncthreads();
        if (!has_expert || must || block.left[e] < static_cast<float>(price)) continue;  // to the next barrier
        float best = 0.0f;
        if (block.substitute[e] != NO_SUBSTITUTE) best = step.ranked_similarity_EE[e * step.E + block.place[e]];
        block.substitute[e] = NO_SUBSTITUTE;
        block.left[e] = loss * (1 - fmaxf(best, 0.0f));
        if (turn == IN_ORDER) worth = static_cast<Count>(block.left[e]);
    }
    // Where no slot is safe, the expert that comes first runs whatever its price. Nothing is ever taken off what is left of
    // it, so it comes first for every thread, however far the others are.
    if (block.settings.select_top_k == 0 && has_expert && !must && worth < price) {
        must = loss > 0.0f;
        for (int other = 0; must && other < step.E; ++other) must = !comes_before(block, other, e);
    }
    bool runs = must || worth >= price;
    if (price_of_a_place(step, block)) runs = is_worth_its_place(step, block, worth, price, must);  // all threads, or none
    if (has_expert && runs) block.primary[e] = true;
    return has_expert && runs;
}

// Finds out for the tokens of a warp what each settling slot becomes: an expert, or -1 (drop). The slots of a token are
// settled in order of weight. Only two substitutes can be the cheapest: the most similar expert of all, and the most
// similar one in a domain that the token visits anyway, since costs rise as similarity falls. `error` is what the change
// costs, but for traffic; 0 where nothing changes.
__device__ int settle_by_price(const Step &step, const Block &block, const Slot &slot, bool settles, int visits,
                               float &error) {
    float price = block.settings.traffic_price;
    int substitute = settles ? block.substitute[slot.expert] : slot.expert;
    float similarity = settles ? step.ranked_similarity_EE[slot.expert * step.E + block.place[slot.expert]] : 0.0f;
    float loss = settles ? (slot.weight * slot.weight) * block.size[slot.expert] : 0.0f;
    bool may_drop = slot.place > 0;  // a token's heaviest slot is never dropped
    error = loss * (1 - similarity);
    if (!has(step, DOMAINS) || !(price > 0)) {
        bool drops = may_drop && loss < error;
        if (drops) error = loss;
        return drops ? -1 : substitute;
    }

    int width = group_width(step.K), lane = lane_index(), first_lane = lane / width * width;
    unsigned group = (width == 32 ? ALL : (1u << width) - 1) << first_lane;
    int outcome = substitute;
    if (settles) visits = NOWHERE;
#pragma unroll 1
    for (int turn = block.settings.select_top_k; turn < step.K; ++turn) {
        unsigned ready = __ballot_sync(ALL, settles && slot.place == turn);
        if (!ready) continue;
        bool active = ready & group;  // else this token's slot of the turn stays as it is
        int from = active ? __ffs(ready & group) - 1 : lane;
        int expert = __shfl_sync(ALL, slot.expert, from);
        int choice = __shfl_sync(ALL, substitute, from);
        float choice_similarity = __shfl_sync(ALL, similarity, from), whole = __shfl_sync(ALL, loss, from);
        int domain = active ? block.domain[choice] : NOWHERE;
        bool visited = is_visited(domain, visits, slot.home, step.K);
        float its_error = whole * (1 - choice_similarity), least = its_error + (visited ? 0.0f : price);

        bool searching = active && !visited;
#pragma unroll 1
        for (int first = 0; __ballot_sync(ALL, searching); first += width) {
            int place = first + lane - first_lane;
            searching &= first < step.E;
            int neighbor = searching && place < step.E ? step.neighbors_EE[expert * step.E + place] : -1;
            bool near = is_visited(neighbor >= 0 ? block.domain[neighbor] : NOWHERE - 1, visits, slot.home, step.K);
            unsigned found = __ballot_sync(ALL, neighbor >= 0 && near && block.primary[neighbor]) & group;
            int nearest = __shfl_sync(ALL, neighbor, found ? __ffs(found) - 1 : lane);
            if (searching && found) {
                int its_place = first + __ffs(found) - 1 - first_lane;
                float cost = whole * (1 - step.ranked_similarity_EE[expert * step.E + its_place]);
                // Of equal costs the larger similarity wins, then the lower id: the choice so far came first.
                if (cost < least) least = its_error = cost, choice = nearest;
                searching = false;
            }
        }
        if (turn > 0 && whole < least) its_error = whole, choice = -1;
        if (active && lane == from) {
            outcome = choice, error = its_error;
            if (choice >= 0) visits = block.domain[choice];
        }
    }
    return outcome;
}

// By a warp: adds the errors of its slots.
__device__ void count_error(Block &block, Count error) {
    unsigned low = __reduce_add_sync(ALL, low_part(error)), high = __reduce_add_sync(ALL, high_part(error));
    if (lane_index() == 0 && (low | high)) atomicAdd(&block.low_error, low), atomicAdd(&block.high_error, high);
}

// Rewrites this thread's slot. Returns its expert, -1 for none.
__device__ int settle(const Step &step, Block &block, const Slot &slot, int visits, int (&counts)[NUM_COUNTERS]) {
    bool is_heavy = has(step, PROJECTION) ? slot.place < block.settings.select_top_k
                                         : slot.expert >= 0 && block.primary[slot.expert];
    bool settles = slot.expert >= 0 && !is_heavy;
    bool critical = settles && block.substitute[slot.expert] == NO_SUBSTITUTE;
    settles &= !critical;
    int outcome = settles ? block.substitute[slot.expert] : slot.expert;
    if (has(step, PROJECTION)) {
        float error;
        outcome = settle_by_price(step, block, slot, settles, visits, error);
        count_error(block, loss_as_integer(step, slot, error));
    }
    counts[REROUTED] = outcome != slot.expert && outcome >= 0;
    counts[DROPPED] = outcome != slot.expert && outcome < 0;
    counts[CRITICAL] = critical;

    float weight = slot.weight;
    if (has(step, PROJECTION) && outcome != slot.expert)
        weight = outcome < 0 ? 0.0f : weight * step.coefficient_EE[slot.expert * step.E + outcome];
    int id = outcome;
    if (has(step, MERGES)) {
        counts[MERGED] = is_merged(outcome, slot.column, step.K, weight);
        if (counts[MERGED]) id = -1, weight = 0.0f;
    } else if (has(step, PROJECTION)) {  // a dropped slot repeats the expert of the heaviest one, with weight 0
        unsigned width = group_width(step.K);
        unsigned heaviest = __ballot_sync(ALL, slot.place == 0 && slot.column < step.K) >> lane_index() / width * width;
        int repeated = __shfl_sync(ALL, outcome, __ffs(heaviest) - 1, width);
        if (slot.expert >= 0 && outcome < 0) id = repeated;
    }
    int at = slot.token * step.K + slot.column;
    if (id != slot.expert) step.ids_TK[at] = id;
    if (weight != slot.weight) step.weights_TK[at] = weight;
    return outcome;
}

// Settles and counts the block's slots, and marks what runs. Marks and totals are complete after a barrier.
__device__ void settle_all(const Step &step, Block &block, const Slot &slot, Neighbors &neighbors, bool acts,
                           unsigned char *runs) {
    if (acts) {  // all threads, or none
        find_substitutes(step, block, neighbors, TO_SETTLE);
        __syncthreads();
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) block.totals[STEPS] = 1, block.totals[ROWS] = block.rows;
    if (!has_tokens(step)) return;
    int counts[NUM_COUNTERS] = {}, outcome = slot.expert;
    int visits = has(step, DOMAINS) && slot.expert >= 0 ? block.domain[slot.expert] : NOWHERE;
    if (has(step, DOMAINS)) count_visit(visits, slot, step.K, BEFORE, counts);
    if (acts) outcome = settle(step, block, slot, visits, counts);
    if (outcome >= 0) runs[outcome] = 1;
    if (has(step, DOMAINS)) {
        bool stays = outcome >= 0 && !counts[MERGED];
        count_visit(stays ? block.domain[outcome] : NOWHERE, slot, step.K, AFTER, counts);
    }
#pragma unroll
    for (int i = REROUTED; i < ESTIMATED_ERROR; ++i) {
        if (ACTIVE <= i && i <= LARGEST_RANK_AFTER) continue;  // count_experts
        if (i == DROPPED && !has(step, PROJECTION)) continue;
        if (i == MERGED && !has(step, MERGES)) continue;
        if (i >= DOMAINS_VISITED && !has(step, DOMAINS)) continue;
        int sum = __reduce_add_sync(ALL, counts[i]);
        if (lane_index() == 0 && sum) atomicAdd(&block.totals[i], sum);
    }
}

// What a block counted goes to the layer's counters.
__device__ void add(const Step &step, int counter, Count count) {
    if (count) atomicAdd(&step.counters[counter], count);
}

__device__ void add_totals(const Step &step, const Block &block) {
    if (threadIdx.x < ESTIMATED_ERROR) add(step, threadIdx.x, block.totals[threadIdx.x]);
    if (has(step, PROJECTION) && threadIdx.x == ESTIMATED_ERROR)
        add(step, ESTIMATED_ERROR, joined(block.high_error, block.low_error));
}

// Counts the experts that valid tokens chose, and those that run in the end.
__device__ void count_experts(const Step &step, Block &block) {
    int e = threadIdx.x, lane = lane_index();
    if (!has(step, RANKS) && e - lane >= step.E) return;  // the warp has no expert
    bool counts[2] = {e < step.E && block.chosen[e], e < step.E && block.runs[e]};
    if (!has(step, RANKS)) {  // one rank, which is the largest
#pragma unroll
        for (int when = BEFORE; when <= AFTER; ++when) {
            int active = __popc(__ballot_sync(ALL, counts[when]));
            if (lane == 0) add(step, ACTIVE + when, active), add(step, LARGEST_RANK + when, active);
        }
        return;
    }
    unsigned rank = e < step.E ? block.rank[e] : 0;
    bool known = rank < static_cast<unsigned>(step.num_ranks);  // else it would be written beyond the array
    if (known && counts[BEFORE]) atomicAdd(&block.active[BEFORE][rank], 1);
    if (known && counts[AFTER]) atomicAdd(&block.active[AFTER][rank], 1);
    __syncthreads();
    if (warp_index() != 0) return;
#pragma unroll
    for (int when = BEFORE; when <= AFTER; ++when) {
        int sum = 0, most = 0;
#pragma unroll 1
        for (int each = lane; each < step.num_ranks; each += 32) {
            int active = block.active[when][each];
            sum += active;
            most = max(most, active);
            if (when == AFTER) add(step, NUM_COUNTERS + each, active);
        }
        sum = __reduce_add_sync(ALL, sum);
        most = __reduce_max_sync(ALL, most);
        if (lane == 0) add(step, ACTIVE + when, sum), add(step, LARGEST_RANK + when, most);
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1) reroute(const Step given) {
    __shared__ Block block;
    const Step step = with_constants(given);
    int e = threadIdx.x;
    Neighbors neighbors;
    Slot slot = begin(step, block, neighbors);
    __syncthreads();
    bool marked = vote(step, block, slot);
    if (price_of_an_expert(step, block)) {  // all threads, or none
        __syncthreads();
        marked |= buy(step, block, neighbors, e < step.E ? loss_of(block, e) : 0);
    }
    bool any_primary = __syncthreads_or(marked);
    if (block.rows == 0) return;  // all threads
    settle_all(step, block, slot, neighbors, is_on(step, block, any_primary), block.runs);
    __syncthreads();
    add_totals(step, block);
    count_experts(step, block);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1) reroute_vote(const Step given) {
    __shared__ Block block;
    const Step step = with_constants(given);
    Workspace &workspace = *step.workspace;
    int e = threadIdx.x;
    Neighbors neighbors;
    let_next_kernel_start();
    Slot slot = begin(step, block, neighbors);
    __syncthreads();
    vote(step, block, slot);
    __syncthreads();
    if (e < step.E) {
        Count said = block.primary[e] ? ALWAYS_PRIMARY : has(step, PROJECTION) ? loss_of(block, e) : 0;
        if (said) atomicAdd(&workspace.votes[e], said);
        if (block.chosen[e]) workspace.chosen[e] = 1;
    }
    if (e == 0 && block.rows) atomicAdd(&workspace.rows, block.rows);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1) reroute_settle(const Step given) {
    __shared__ Block block;
    const Step step = with_constants(given);
    Workspace &workspace = *step.workspace;
    int e = threadIdx.x;
    Neighbors neighbors;
    Slot slot = begin(step, block, neighbors);
    Count votes = e < step.E ? workspace.votes[e] : 0;
    bool chosen = e < step.E && workspace.chosen[e];
    int rows = workspace.rows;
    __syncthreads();
    bool primary = e < step.E && votes >= ALWAYS_PRIMARY;
    if (e < step.E) block.primary[e] = primary, block.chosen[e] = chosen;
    if (e == 0) block.rows = rows;
    if (price_of_an_expert(step, block)) primary |= buy(step, block, neighbors, votes);  // all threads, or none
    bool any_primary = __syncthreads_or(primary);
    if (block.rows > 0) {  // all threads, or none
        if (has(step, PROJECTION)) slot.place = place_in_token(slot, step.K);
        settle_all(step, block, slot, neighbors, is_on(step, block, any_primary), workspace.runs);
        __syncthreads();
        add_totals(step, block);
    }

    // All blocks have read the votes and marked what runs once the last one gets here: it counts that, and leaves zeros
    // for the next step.
    if (e == 0) {
        __threadfence();  // who sees that the block has finished also sees its marks
        block.is_last = atomicAdd(&workspace.finished_blocks, 1u) == gridDim.x - 1;
        __threadfence();  // and here it is seen before the others' marks are read
    }
    __syncthreads();
    if (!block.is_last) return;
    if (e < step.E) {
        block.runs[e] = workspace.runs[e];
        workspace.votes[e] = 0;
        workspace.chosen[e] = workspace.runs[e] = 0;
    }
    if (e == 0) workspace.rows = 0, workspace.finished_blocks = 0;
    count_experts(step, block);
}
