// The backward of attention.cpp: probabilities again from lse, tile by tile (Dao et al. 2022, algorithm 4).
// One task is a (batch, kv head), so dk and dv have one writer.
#include "attention.h"

namespace mpillm {

// what a task holds: packed operands of its keys, and the block of queries at work
template <class T>
struct Held {
    T *k_panels, *v_panels, *k_rows;   // keys and values of the task
    T *dk, *dv;                        // sums over the query heads, (keys, padded)
    T *q_rows, *dout_rows, *dq;        // (query_block, padded); q carries the scale
    T *probs, *dscores;                // (query_block, key_block)
    T *inner;                          // (query_block,), sum of dout * out
};

template <class T>
struct Backward {
    View<const T> dout, q, k, v, out;
    const T* lse;
    View<T> dq, dk, dv;
    T scale;
    Shape shape;
    ProbabilityDropout drop;

    int64_t padded() const { return round_up(shape.width, Vector<T>::lanes); }

    // a row of scores and one of dprobs become probabilities (dropped ones) and dscores; zeros behind `visible`
    void row(T* __restrict probs, T* __restrict dscores, int64_t visible, T of_lse, T inner, const T* factors) const {
        const int64_t whole = hide_behind(probs, visible);
        if (factors) {
#pragma omp simd
            for (int64_t j = 0; j < whole; ++j) {
                const T p = exp(probs[j] - of_lse);
                probs[j] = p * factors[j];
                dscores[j] = p * (dscores[j] * factors[j] - inner);
            }
        } else {
#pragma omp simd
            for (int64_t j = 0; j < whole; ++j) {
                const T p = exp(probs[j] - of_lse);
                probs[j] = p;
                dscores[j] = p * (dscores[j] - inner);
            }
        }
        for (int64_t j = whole; j < key_block; ++j) probs[j] = dscores[j] = 0;
    }

    // strip_rows queries against one block of keys: fills their rows of the tiles, adds to dq
    void strip(const Held<T>& at, int64_t b, int64_t h, int64_t t0, int64_t r, int64_t count, int64_t j0) const {
        const int64_t wide = padded(), last = r + strip_rows < count ? r + strip_rows : count;
        T *probs = at.probs + r * key_block, *dscores = at.dscores + r * key_block;
        int64_t keys = shape.visible(t0 + last - 1) - j0;
        keys = keys < 0 ? 0 : keys < key_block ? keys : key_block;
        strip_scores(probs, at.q_rows + r * wide, wide, at.k_panels, shape.width, j0, keys);
        strip_scores(dscores, at.dout_rows + r * wide, wide, at.v_panels, shape.width, j0, keys);
        for (int64_t i = 0; i < strip_rows; ++i) {
            const bool real = r + i < count;
            int64_t visible = real ? shape.visible(t0 + r + i) - j0 : 0;
            visible = visible < 0 ? 0 : visible < keys ? visible : keys;
            const T of_lse = real ? lse[(b * shape.heads + h) * shape.queries + t0 + r + i] : T(0);
            T factors[key_block];
            const bool dropping = drop.scale != 0 && visible > 0;
            if (dropping) drop.factors(factors, b, t0 + r + i, h, j0, round_up(visible, Vector<T>::lanes));
            row(probs + i * key_block, dscores + i * key_block, visible, of_lse, at.inner[r + i], dropping ? factors : nullptr);
        }
        strip_times_rows(keys, static_cast<const T*>(dscores), key_block, int64_t(1), static_cast<const T*>(at.k_rows + j0 * wide), wide,
                         at.dq + r * wide, wide, wide / Vector<T>::lanes, true);
    }

    // the tiles of probabilities and dscores, transposed, times the block's queries: adds to dv and dk
    void keys(const Held<T>& at, int64_t t0, int64_t rows, int64_t j0, int64_t end) const {
        const int64_t wide = padded(), vectors = wide / Vector<T>::lanes;
        for (int64_t j = j0; j < end && j < j0 + key_block; j += strip_rows) {
            int64_t first = shape.causal ? j - (shape.keys - shape.queries) - t0 : 0;  // first query that sees key j
            first = first < 0 ? 0 : first;
            const int64_t from = first * key_block + j - j0;
            strip_times_rows(rows - first, static_cast<const T*>(at.probs + from), int64_t(1), key_block,
                             static_cast<const T*>(at.dout_rows + first * wide), wide, at.dv + j * wide, wide, vectors, true);
            strip_times_rows(rows - first, static_cast<const T*>(at.dscores + from), int64_t(1), key_block,
                             static_cast<const T*>(at.q_rows + first * wide), wide, at.dk + j * wide, wide, vectors, true);
        }
    }

    // one block of queries of one head
    void block(const Held<T>& at, int64_t b, int64_t h, int64_t t0) const {
        const int64_t width = shape.width, wide = padded();
        const int64_t count = t0 + query_block < shape.queries ? query_block : shape.queries - t0;
        const int64_t rows = round_up(count, strip_rows);
        pack_rows(at.q_rows, q.at(b, t0, h), q.of_token, count, width, rows, wide, scale);
        pack_rows(at.dout_rows, dout.at(b, t0, h), dout.of_token, count, width, rows, wide, T(1));
        std::memset(at.dq, 0, size_t(rows * wide) * sizeof(T));
        for (int64_t r = 0; r < rows; ++r) {
            T sum = 0;
            const T *d = at.dout_rows + r * wide, *o = out.at(b, t0 + (r < count ? r : 0), h);
#pragma omp simd reduction(+ : sum)
            for (int64_t c = 0; c < width; ++c) sum += d[c] * o[c];
            at.inner[r] = sum;
        }
        const int64_t end = shape.visible(t0 + count - 1);
        for (int64_t j0 = 0; j0 < end; j0 += key_block) {
            for (int64_t r = 0; r < rows; r += strip_rows) strip(at, b, h, t0, r, count, j0);
            keys(at, t0, rows, j0, end);
        }
        for (int64_t r = 0; r < count; ++r) {
            T* to = dq.at(b, t0 + r, h);
            for (int64_t c = 0; c < width; ++c) to[c] = at.dq[r * wide + c] * scale;
        }
    }

    Held<T> take(Scratch<T>& scratch) const {
        const int64_t wide = padded(), key_rows = round_up(shape.keys, strip_rows);
        const int64_t panels = round_up(shape.keys, Vector<T>::panel) * shape.width;
        const int64_t tile = query_block * key_block;
        scratch.start(2 * panels + 3 * key_rows * wide + 3 * query_block * wide + 2 * tile + query_block + 16 * 16);
        Held<T> at;
        at.k_panels = scratch.take(panels);
        at.v_panels = scratch.take(panels);
        at.k_rows = scratch.take(key_rows * wide);
        at.dk = scratch.take(key_rows * wide);
        at.dv = scratch.take(key_rows * wide);
        at.q_rows = scratch.take(query_block * wide);
        at.dout_rows = scratch.take(query_block * wide);
        at.dq = scratch.take(query_block * wide);
        at.probs = scratch.take(tile);
        at.dscores = scratch.take(tile);
        at.inner = scratch.take(query_block);
        std::memset(at.dk, 0, size_t(key_rows * wide) * sizeof(T));
        std::memset(at.dv, 0, size_t(key_rows * wide) * sizeof(T));
        return at;
    }

    void task(int64_t b, int64_t kv) const {
        thread_local Scratch<T> scratch;
        const Held<T> at = take(scratch);
        const int64_t width = shape.width, wide = padded();
        pack_rows(at.k_rows, v.at(b, 0, kv), v.of_token, shape.keys, width, shape.keys, wide, T(1));
        pack_transposed(at.v_panels, static_cast<const T*>(at.k_rows), wide, shape.keys, width);  // faster from packed rows
        pack_rows(at.k_rows, k.at(b, 0, kv), k.of_token, shape.keys, width, shape.keys, wide, T(1));
        pack_transposed(at.k_panels, static_cast<const T*>(at.k_rows), wide, shape.keys, width);
        for (int64_t h = kv * shape.group(); h < (kv + 1) * shape.group(); ++h)
            for (int64_t t0 = 0; t0 < shape.queries; t0 += query_block) block(at, b, h, t0);
        for (int64_t j = 0; j < shape.keys; ++j) {
            std::memcpy(dk.at(b, j, kv), at.dk + j * wide, size_t(width) * sizeof(T));
            std::memcpy(dv.at(b, j, kv), at.dv + j * wide, size_t(width) * sizeof(T));
        }
    }
};

}  // namespace mpillm

// sizes: B, T, S, H, K, D, causal; strides: (of_batch, of_token, of_head) of dout, q, k, v, out, dq, dk, dv
#define EXPORT(T, S)                                                                                                    \
    extern "C" void mpillm_attention_backward_##S(const T* dout, const T* q, const T* k, const T* v, const T* out,      \
                                                  const T* lse, T* dq, T* dk, T* dv, double scale,                      \
                                                  const int64_t* sizes, const int64_t* strides,                         \
                                                  const mpillm::ProbabilityDropout* drop) {                             \
        using namespace mpillm;                                                                                         \
        const int64_t *n = sizes, *s = strides;                                                                         \
        const Shape shape{n[0], n[1], n[2], n[3], n[4], n[5], int(n[6])};                                               \
        const Backward<T> run{{dout, s[0], s[1], s[2]},    {q, s[3], s[4], s[5]},       {k, s[6], s[7], s[8]},          \
                              {v, s[9], s[10], s[11]},     {out, s[12], s[13], s[14]},  lse, {dq, s[15], s[16], s[17]}, \
                              {dk, s[18], s[19], s[20]},   {dv, s[21], s[22], s[23]},   T(scale), shape, *drop};        \
        parallel_for(shape.batch * shape.kv_heads, shape.batch * shape.heads * shape.queries * shape.keys,              \
                     [&](int64_t i) { run.task(i / shape.kv_heads, i % shape.kv_heads); });                             \
    }
EXPORT(float, f32)
EXPORT(double, f64)
