/* The selective scan on a CPU in fp32, 16 channels at a time; what it computes and its layouts are in scan.py.
 *
 * Time goes in chunks of CHUNK steps. Forward keeps the state before each chunk alone; backward makes a chunk's states
 * again from it and walks them in reverse, in buffers that the processor's own cache holds. Sums over channels are kept
 * lane by lane until a chunk is done. The order of every sum is fixed.
 */
#include <stdint.h>
#include <string.h>

#define LANES 16
#define CHUNK 16
#define LARGEST_STATE 64

typedef float lanes __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));

static inline lanes load(const float *from) {
    lanes value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline void store(float *to, lanes value) { memcpy(to, &value, sizeof value); }

/* exp of x <= 0 to 2 units in the last place: 2^n times a Taylor polynomial on |f| <= ln(2) / 2; 0 below -87. */
static inline lanes decay_of(lanes x) {
    const float rounding = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to a whole number */
    lanes whole = x * 1.44269504f + rounding;
    words bits = (words)whole << 23;
    whole -= rounding;
    lanes f = x - whole * 0.693145752f - whole * 1.42860677e-6f; /* ln(2), in two parts */
    lanes sum = f * (1.0f / 5040) + 1.0f / 720;
    sum = sum * f + 1.0f / 120;
    sum = sum * f + 1.0f / 24;
    sum = sum * f + 1.0f / 6;
    sum = sum * f + 0.5f;
    sum = sum * f + 1.0f;
    sum = sum * f + 1.0f;
    words result = (words)sum + bits;
    ints vanishes = x < -87.0f;
    return (lanes)(result & ~(words)vanishes);
}

static inline float total(lanes value) {
    float sum = 0;
    for (int w = 0; w < LANES; w++) sum += value[w];
    return sum;
}

int scan_lanes(void) { return LANES; }
int scan_chunk(void) { return CHUNK; }
int scan_largest_state(void) { return LARGEST_STATE; }

/* decay_step, step, x, y: [T, D]; a: [N, D]; b, c: [T, N]; state: [N, D], from the first step's to the last one's;
 * starts: [ceil(T / CHUNK), N, D], or null where nothing goes backward. */
void scan_forward(int64_t T, int64_t N, int64_t D, const float *decay_step, const float *step, const float *x,
                  const float *a, const float *b, const float *c, float *y, float *state, float *starts) {
    for (int64_t begin = 0, chunk = 0; begin < T; begin += CHUNK, chunk++) {
        int64_t end = begin + CHUNK < T ? begin + CHUNK : T;
        if (starts) memcpy(starts + chunk * N * D, state, N * D * sizeof(float));
        for (int64_t d = 0; d < D; d += LANES) {
            lanes h[LARGEST_STATE];
            for (int64_t n = 0; n < N; n++) h[n] = load(state + n * D + d);
            for (int64_t t = begin; t < end; t++) {
                lanes decaying = load(decay_step + t * D + d), out = {0};
                lanes entering = load(step + t * D + d) * load(x + t * D + d);
                for (int64_t n = 0; n < N; n++) {
                    h[n] = decay_of(decaying * load(a + n * D + d)) * h[n] + entering * b[t * N + n];
                    out += h[n] * c[t * N + n];
                }
                store(y + t * D + d, out);
            }
            for (int64_t n = 0; n < N; n++) store(state + n * D + d, h[n]);
        }
    }
}

/* grad_state: [N, D], zero at first; work: [T, D] of dy / d(step x); what has the name grad_ is written, grad_a zero
 * at first. */
void scan_backward(int64_t T, int64_t N, int64_t D, const float *decay_step, const float *step, const float *x,
                   const float *a, const float *b, const float *c, const float *starts, const float *grad_y,
                   float *grad_state, float *grad_step, float *grad_x, float *grad_a, float *grad_b, float *grad_c) {
    static _Thread_local lanes decay[CHUNK][LARGEST_STATE], h[CHUNK + 1][LARGEST_STATE];
    static _Thread_local lanes of_b[CHUNK][LARGEST_STATE], of_c[CHUNK][LARGEST_STATE];
    for (int64_t chunk = (T + CHUNK - 1) / CHUNK - 1; chunk >= 0; chunk--) {
        int64_t begin = chunk * CHUNK, end = begin + CHUNK < T ? begin + CHUNK : T, length = end - begin;
        memset(of_b, 0, sizeof of_b);
        memset(of_c, 0, sizeof of_c);
        for (int64_t d = 0; d < D; d += LANES) {
            for (int64_t n = 0; n < N; n++) h[0][n] = load(starts + (chunk * N + n) * D + d);
            for (int64_t i = 0; i < length; i++) {
                int64_t t = begin + i;
                lanes decaying = load(decay_step + t * D + d);
                lanes entering = load(step + t * D + d) * load(x + t * D + d);
                for (int64_t n = 0; n < N; n++) {
                    decay[i][n] = decay_of(decaying * load(a + n * D + d));
                    h[i + 1][n] = decay[i][n] * h[i][n] + entering * b[t * N + n];
                }
            }
            for (int64_t i = length - 1; i >= 0; i--) {
                int64_t t = begin + i;
                lanes stepped = load(step + t * D + d), entered = load(x + t * D + d), gy = load(grad_y + t * D + d);
                lanes entering = stepped * entered, of_entering = {0}, of_step = {0};
                for (int64_t n = 0; n < N; n++) {
                    lanes g = load(grad_state + n * D + d) + gy * c[t * N + n];
                    of_c[i][n] += gy * h[i + 1][n];
                    of_b[i][n] += g * entering;
                    of_entering += g * b[t * N + n];
                    g *= decay[i][n];
                    lanes of_exponent = g * h[i][n];
                    of_step += of_exponent * load(a + n * D + d);
                    store(grad_a + n * D + d, load(grad_a + n * D + d) + of_exponent * stepped);
                    store(grad_state + n * D + d, g);
                }
                store(grad_step + t * D + d, of_step + of_entering * entered);
                store(grad_x + t * D + d, of_entering * stepped);
            }
        }
        for (int64_t i = 0; i < length; i++)
            for (int64_t n = 0; n < N; n++) {
                grad_b[(begin + i) * N + n] = total(of_b[i][n]);
                grad_c[(begin + i) * N + n] = total(of_c[i][n]);
            }
    }
}
