// The two places where a step on a CPU spends its time outside of the base model's own products: the update of each
// token by its own adapter, and its attention over a cache of blocks. Each token, of an answer or of a short prompt, is
// computed by itself, in float32, so that what else is in the batch can't change a bit of its result.
//
// Compiled by kernels.py for the machine it runs on; called through plain C functions with raw pointers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t BLOCK = 16;  // tokens a block; kernels.py has the same number

struct bfloat16 {
    uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void store(float *place, float value) { *place = value; }

inline void store(bfloat16 *place, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;                 // rounding could make NaN an infinity
    place->bits = static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded);
}

template <typename T>
inline float dot(const float *x, const T *y, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += x[i] * load(y[i]);
    return sum;
}

// out += w[0] * rows[0] + w[1] * rows[1] + ...; four rows at a time, to touch `out` less often.
template <typename T>
inline void add_rows(float *out, const float *w, const T *rows, int64_t num_rows, int64_t stride, int64_t count) {
    int64_t r = 0;
    for (; r + 4 <= num_rows; r += 4) {
        const T *a = rows + r * stride, *b = a + stride, *c = b + stride, *d = c + stride;
        const float wa = w[r], wb = w[r + 1], wc = w[r + 2], wd = w[r + 3];
#pragma omp simd
        for (int64_t j = 0; j < count; ++j)
            out[j] += wa * load(a[j]) + wb * load(b[j]) + wc * load(c[j]) + wd * load(d[j]);
    }
    for (; r < num_rows; ++r) {
        const T *a = rows + r * stride;
        const float wa = w[r];
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) out[j] += wa * load(a[j]);
    }
}

float *scratch(size_t count) {
    thread_local std::vector<float> buffer;
    if (buffer.size() < count) buffer.resize(count);
    return buffer.data();
}

// y[t] += B[s] (A[s] x[t]) with s = slots[t] - 1, for every token t whose slot is not 0.
//   x [tokens, in], y [tokens, out], a [num_slots, members, max_rank, in], b [num_slots, max_rank, out];
//   ends[m] is where member m's columns of `out` end; ranks[s] is the rank in use of slot s + 1.
template <typename T>
void add_low_rank(T *y, const T *x, const T *a, const T *b, const int32_t *slots, const int32_t *ranks,
                  const int32_t *ends, int64_t tokens, int64_t members, int64_t max_rank, int64_t in, int64_t out) {
#pragma omp parallel for schedule(static) if (tokens > 1)
    for (int64_t t = 0; t < tokens; ++t) {
        if (slots[t] == 0) continue;
        const int64_t slot = slots[t] - 1, rank = ranks[slot];
        float *wide = scratch(in + out + max_rank), *sum = wide + in, *low = sum + out;
        for (int64_t i = 0; i < in; ++i) wide[i] = load(x[t * in + i]);
        for (int64_t j = 0; j < out; ++j) sum[j] = load(y[t * out + j]);
        int64_t begin = 0;
        for (int64_t m = 0; m < members; ++m) {
            const T *rows = a + (slot * members + m) * max_rank * in;
            for (int64_t r = 0; r < rank; ++r) low[r] = dot(wide, rows + r * in, in);
            add_rows(sum + begin, low, b + slot * max_rank * out + begin, rank, out, ends[m] - begin);
            begin = ends[m];
        }
        for (int64_t j = 0; j < out; ++j) store(y + t * out + j, sum[j]);
    }
}

// e^x for x <= 0, to a few units in the last place: 2^n times a polynomial, so that a loop over it becomes vectors.
inline float exp_negative(float x) {
    const float y = std::max(x, -87.0f) * 1.44269504f, n = std::floor(y), f = (y - n) * 0.69314718f;
    const float power = 1.0f + f * (1.0f + f * (0.5f + f * (1.6666667e-1f + f * (4.1666668e-2f + f * (8.3333338e-3f +
                        f * (1.3888889e-3f + f * 1.9841270e-4f))))));
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return power * scale;
}

// Softmax of scores[begin..end), after a cap of cap * tanh(score / cap) if there is one; 0 before begin.
inline void soften(float *scores, int64_t begin, int64_t end, float cap) {
    if (cap > 0)
        for (int64_t n = begin; n < end; ++n) scores[n] = cap * std::tanh(scores[n] / cap);
    float peak = scores[begin], total = 0;
#pragma omp simd reduction(max : peak)
    for (int64_t n = begin; n < end; ++n) peak = scores[n] > peak ? scores[n] : peak;
#pragma omp simd reduction(+ : total)
    for (int64_t n = begin; n < end; ++n) {
        scores[n] = exp_negative(scores[n] - peak);
        total += scores[n];
    }
    const float scale = 1.0f / total;
    for (int64_t n = begin; n < end; ++n) scores[n] *= scale;
    std::fill(scores, scores + begin, 0.0f);
}

// scores[g][n] = q[g] . key n of one block [dim, BLOCK], for HEADS heads that share the keys.
template <int HEADS, typename T>
inline void score_block(float *scores, int64_t stride, const float *q, const T *block, int64_t dim) {
    float sum[HEADS][BLOCK] = {};
    for (int64_t i = 0; i < dim; ++i)
        for (int g = 0; g < HEADS; ++g)
#pragma omp simd
            for (int n = 0; n < BLOCK; ++n) sum[g][n] += q[g * dim + i] * load(block[i * BLOCK + n]);
    for (int g = 0; g < HEADS; ++g) std::memcpy(scores + g * stride, sum[g], sizeof sum[g]);
}

// sums[g] += the values of one block [BLOCK, dim], weighed by scores[g][n], for HEADS heads that share the values.
template <int HEADS, typename T>
inline void weigh_block(float *sums, const float *scores, int64_t stride, const T *block, int64_t count, int64_t dim) {
    constexpr int WIDTH = 32;
    int64_t begin = 0;
    for (; begin + WIDTH <= dim; begin += WIDTH) {
        float sum[HEADS][WIDTH];
        for (int g = 0; g < HEADS; ++g) std::memcpy(sum[g], sums + g * dim + begin, sizeof sum[g]);
        for (int64_t n = 0; n < count; ++n)
            for (int g = 0; g < HEADS; ++g)
#pragma omp simd
                for (int i = 0; i < WIDTH; ++i) sum[g][i] += scores[g * stride + n] * load(block[n * dim + begin + i]);
        for (int g = 0; g < HEADS; ++g) std::memcpy(sums + g * dim + begin, sum[g], sizeof sum[g]);
    }
    for (int64_t n = 0; n < count; ++n)
        for (int g = 0; g < HEADS; ++g)
            for (int64_t i = begin; i < dim; ++i) sums[g * dim + i] += scores[g * stride + n] * load(block[n * dim + i]);
}

// Put the keys and values of new tokens into the cache: token t goes to place offsets[t] of block blocks[t].
template <typename T>
void write(T *keys, T *values, const T *key, const T *value, const int32_t *blocks, const int32_t *offsets,
           int64_t tokens, int64_t kv_heads, int64_t dim, int64_t key_token_stride, int64_t key_head_stride,
           int64_t value_token_stride, int64_t value_head_stride) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < kv_heads; ++h) {
            const int64_t start = (blocks[t] * kv_heads + h) * dim * BLOCK;
            const T *k = key + t * key_token_stride + h * key_head_stride;
            const T *v = value + t * value_token_stride + h * value_head_stride;
            for (int64_t i = 0; i < dim; ++i) keys[start + i * BLOCK + offsets[t]] = k[i];
            std::memcpy(values + start + offsets[t] * dim, v, dim * sizeof(T));
        }
}

// What one token's query sees of one key-value head.
template <typename T>
struct Sight {
    const T *keys, *values;  // of this head, in block 0
    const int32_t *blocks;
    int64_t block_stride, begin, end, dim;
    float scale, cap;
};

// Attention of HEADS consecutive query heads over the keys and values that they share.
template <int HEADS, typename T>
void attend_heads(T *out, const T *query, int64_t head_stride, const Sight<T> &sight) {
    const int64_t dim = sight.dim, first = sight.begin / BLOCK, num_blocks = (sight.end + BLOCK - 1) / BLOCK - first;
    const int64_t stride = num_blocks * BLOCK;
    float *q = scratch(HEADS * (2 * dim + stride)), *sums = q + HEADS * dim, *scores = sums + HEADS * dim;
    for (int g = 0; g < HEADS; ++g)
        for (int64_t i = 0; i < dim; ++i) q[g * dim + i] = load(query[g * head_stride + i]) * sight.scale;
    for (int64_t p = 0; p < num_blocks; ++p)
        score_block<HEADS>(scores + p * BLOCK, stride, q, sight.keys + sight.blocks[first + p] * sight.block_stride, dim);
    for (int g = 0; g < HEADS; ++g)
        soften(scores + g * stride, sight.begin - first * BLOCK, sight.end - first * BLOCK, sight.cap);
    std::fill(sums, sums + HEADS * dim, 0.0f);
    for (int64_t p = 0; p < num_blocks; ++p) {
        const int64_t count = std::min<int64_t>(BLOCK, sight.end - (first + p) * BLOCK);
        const T *block = sight.values + sight.blocks[first + p] * sight.block_stride;
        weigh_block<HEADS>(sums, scores + p * BLOCK, stride, block, count, dim);
    }
    for (int64_t i = 0; i < HEADS * dim; ++i) store(out + i, sums[i]);
}

// Attention of single query tokens over their sequences' blocks.
//   query [tokens, heads, dim] by strides, out [tokens, heads, dim];
//   keys [blocks, kv_heads, dim, BLOCK], so that one load serves all keys of a block; values [blocks, kv_heads, BLOCK, dim];
//   table [rows, table_stride] holds block numbers; token t is of row rows[t] and sees the keys before lengths[t], at
//   most the last `window` of them unless that is 0.
template <typename T>
void attend(T *out, const T *query, const T *keys, const T *values, const int32_t *table, const int32_t *rows,
            const int32_t *lengths, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t table_stride,
            int64_t token_stride, int64_t head_stride, int64_t window, float scale, float cap) {
    const int64_t group = heads / kv_heads;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < kv_heads; ++h) {
            const int64_t end = lengths[t], begin = window > 0 ? std::max<int64_t>(0, end - window) : 0;
            const int64_t offset = h * dim * BLOCK, stride = kv_heads * dim * BLOCK;
            const Sight<T> sight{keys + offset, values + offset, table + rows[t] * table_stride, stride, begin, end,
                                 dim, scale, cap};
            int64_t head = h * group;
            const int64_t last = head + group;
            while (head < last) {
                const T *q = query + t * token_stride + head * head_stride;
                T *place = out + (t * heads + head) * dim;
                switch (last - head) {
                    case 1: attend_heads<1>(place, q, head_stride, sight), head += 1; break;
                    case 2: attend_heads<2>(place, q, head_stride, sight), head += 2; break;
                    case 3: attend_heads<3>(place, q, head_stride, sight), head += 3; break;
                    default: attend_heads<4>(place, q, head_stride, sight), head += 4;
                }
            }
        }
    }
}

}  // namespace

#define HOTSWAP_ENTRY_POINTS(NAME, T)                                                                                  \
    extern "C" void add_low_rank_##NAME(T *y, const T *x, const T *a, const T *b, const int32_t *slots,                \
                                        const int32_t *ranks, const int32_t *ends, int64_t tokens, int64_t members,    \
                                        int64_t max_rank, int64_t in, int64_t out) {                                   \
        add_low_rank(y, x, a, b, slots, ranks, ends, tokens, members, max_rank, in, out);                              \
    }                                                                                                                  \
    extern "C" void write_##NAME(T *keys, T *values, const T *key, const T *value, const int32_t *blocks,              \
                                 const int32_t *offsets, int64_t tokens, int64_t kv_heads, int64_t dim, int64_t kt,    \
                                 int64_t kh, int64_t vt, int64_t vh) {                                                 \
        write(keys, values, key, value, blocks, offsets, tokens, kv_heads, dim, kt, kh, vt, vh);                       \
    }                                                                                                                  \
    extern "C" void attend_##NAME(T *out, const T *query, const T *keys, const T *values, const int32_t *table,        \
                                  const int32_t *rows, const int32_t *lengths, int64_t tokens, int64_t heads,          \
                                  int64_t kv_heads, int64_t dim, int64_t table_stride, int64_t token_stride,           \
                                  int64_t head_stride, int64_t window, float scale, float cap) {                       \
        attend(out, query, keys, values, table, rows, lengths, tokens, heads, kv_heads, dim, table_stride,             \
               token_stride, head_stride, window, scale, cap);                                                         \
    }

HOTSWAP_ENTRY_POINTS(float32, float)
HOTSWAP_ENTRY_POINTS(bfloat16, bfloat16)
