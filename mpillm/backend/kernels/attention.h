// What attention forward and backward share: sizes, views, scratch, and the scores of a strip of queries.
#pragma once

#include "philox.h"
#include "tile.h"

namespace mpillm {

// a (B, tokens, heads, D) view: strides in elements, last dimension contiguous
template <class T>
struct View {
    T* data;
    int64_t of_batch, of_token, of_head;

    T* at(int64_t b, int64_t t, int64_t h) const { return data + b * of_batch + t * of_token + h * of_head; }
};

struct Shape {
    int64_t batch, queries, keys, heads, kv_heads, width;
    int causal;

    // keys that query t sees: 0..visible-1
    int64_t visible(int64_t t) const {
        if (!causal) return keys;
        const int64_t last = t + keys - queries + 1;
        return last < 0 ? 0 : last > keys ? keys : last;
    }
    int64_t group() const { return heads / kv_heads; }
};

constexpr int64_t query_block = 96;  // queries that share a pass over the keys; multiple of strip_rows
constexpr int64_t key_block = 192;   // keys of a tile of probabilities; multiple of strip_rows, of every panel and of 4
static_assert(query_block % strip_rows == 0 && key_block % strip_rows == 0, "blocks are whole strips");
static_assert(key_block + 4 <= DropoutRow::most, "one call gives the dropout factors of a row of a tile");

// dropout of probabilities; scale 0 = none. Block of (head, key): head * ceil(keys / 4) + key / 4, both numbers global
struct ProbabilityDropout {
    uint64_t key, threshold;
    double scale;
    uint32_t step;
    const int64_t *samples, *positions;
    int64_t first_head, first_key, keys;  // of the call; of the call; of the whole sequence

    // factors of the call's keys j0..j0 + count, count <= key_block, of query t and head h; writes up to key_block of them
    template <class T>
    void factors(T* out, int64_t b, int64_t t, int64_t h, int64_t j0, int64_t count) const {
        const DropoutRow row{key, threshold, scale, step, uint32_t(samples[b]), uint32_t(positions[t])};
        const int64_t block = (first_head + h) * ((keys + 3) / 4) + (first_key + j0) / 4, lead = (first_key + j0) % 4;
        if (lead == 0) return row.factors(out, uint64_t(block), (count + 3) / 4);
        T whole[key_block + 4];  // from the start of the block on, which lies before j0
        row.factors(whole, uint64_t(block), (lead + count + 3) / 4);
        std::memcpy(out, whole + lead, size_t(count) * sizeof(T));
    }
};

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// memory of a thread, kept from call to call: fresh pages would cost more than the work on short sequences
template <class T>
struct Scratch {
    T* data = nullptr;
    size_t size = 0, used = 0;

    void start(int64_t elements) {
        used = 0;
        if (size_t(elements) <= size) return;
        std::free(data);
        size = size_t(round_up(elements, 1024));
        data = static_cast<T*>(std::aligned_alloc(64, size * sizeof(T)));
        if (!data) std::abort();
    }
    T* take(int64_t elements) {  // parts start at cache lines
        T* part = data + used;
        used += size_t(round_up(elements, 16));
        return part;
    }
    ~Scratch() { std::free(data); }
};

// scores (strip_rows, keys of the tile) = q (strip_rows, D) times the transposed panels of k from first_key on
template <class T>
inline void strip_scores(T* scores, const T* q, int64_t of_q, const T* k_panels, int64_t width, int64_t first_key, int64_t count) {
    constexpr int64_t panel = Vector<T>::panel, lanes = Vector<T>::lanes;
    for (int64_t j = 0; j < count; j += panel) {
        const int64_t vectors = count - j < panel ? (count - j + lanes - 1) / lanes : panel_vectors;
        strip_times_vectors(vectors, width, q, of_q, int64_t(1), k_panels + (first_key + j) * width, panel, scores + j, key_block, false);
    }
}

// scores of keys that a query does not see, up to the next whole vector: their exp is 0. Returns the whole vectors' end
template <class T>
inline int64_t hide_behind(T* scores, int64_t visible) {
    const int64_t end = round_up(visible, Vector<T>::lanes);
    for (int64_t j = visible; j < end; ++j) scores[j] = -std::numeric_limits<T>::infinity();
    return end;
}

}  // namespace mpillm
