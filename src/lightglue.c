/* LightGlue (kpmatch_ros/models/lightglue_layers.py), compiled for x86-64: a layer in bfloat16.
 *
 * PyTorch's operators there describe the computation. They run if this library is not built, or if the processor does
 * not have AVX-512 with bfloat16. Tiles (AMX), which some of these processors have, multiply several times as fast. In
 * PyTorch, each of a layer's many small operations writes its result to memory for the next one, which takes longer
 * than the products. Here, a block of rows passes through all operations in the processor's cache. Products are of
 * bfloat16 numbers with sums in float32, as in PyTorch. Values between the products stay in float32.
 * test/test_compiled_layers.py compares both.
 *
 * The code is C11 without Python's headers: kpmatch_ros/models/compiled.py calls it with ctypes.
 */
#include "networks.h"

#ifdef KPMATCH_COMPILES
#include "team.h"
#include "layer.h"

/* The data of an image between the steps of a layer. All arrays have whole blocks of rows. */
typedef struct {
    uint16_t *query;        /* (rows, size) */
    uint16_t *key, *value;  /* of each head, packed as the right side of a product */
} Heads;

typedef struct {
    uint16_t *rounded, *message; /* (rows, size) */
    Heads within, across;
} Image;

typedef struct {
    const Layer *layer;
    Image images[2];
    Team *team;
    int64_t number; /* of this thread */
    /* For a block of rows: */
    float *sums;      /* results of products, as wide as the widest one */
    uint16_t *inputs; /* inputs of the next product */
} Thread;

/* Multiply into the thread's sums. */
INLINE void multiply_into_sums(const Thread *thread, const Side *sides, int count, const uint16_t *packed,
                               int64_t columns)
{
    multiply(thread->team->tiles, sides, count, packed, columns, thread->sums);
}

/* Functions. Both polynomials were fitted by reweighted least squares. */

/* 2^x, with a relative error of 8e-5, a thirtieth of the rounding error of bfloat16. */
INLINE __m512 power_of_two(__m512 x)
{
    const __m512 part = _mm512_reduce_ps(x, 0x01); /* x - floor(x) */
    __m512 power = _mm512_set1_ps(0.07802446186542511f);
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(0.22606727480888367f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(0.6958335041999817f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(0.9999251961708069f));
    return _mm512_scalef_ps(power, x); /* times 2^floor(x) */
}

/* GELU: x times the cumulative normal distribution at x. The error is 5e-5 for |x| up to 4, and 1e-4 of x beyond. */
INLINE __m512 gelu(__m512 x)
{
    const __m512 near = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(4)), _mm512_set1_ps(-4));
    const __m512 square = _mm512_mul_ps(near, near);
    __m512 slope = _mm512_set1_ps(-1.3012824151559244e-09f);
    slope = _mm512_fmadd_ps(slope, square, _mm512_set1_ps(1.0419532259220432e-07f));
    slope = _mm512_fmadd_ps(slope, square, _mm512_set1_ps(-3.657115485111717e-06f));
    slope = _mm512_fmadd_ps(slope, square, _mm512_set1_ps(7.485483365599066e-05f));
    slope = _mm512_fmadd_ps(slope, square, _mm512_set1_ps(-0.0010064890375360847f));
    slope = _mm512_fmadd_ps(slope, square, _mm512_set1_ps(0.009505393914878368f));
    slope = _mm512_fmadd_ps(slope, square, _mm512_set1_ps(-0.06588783860206604f));
    slope = _mm512_fmadd_ps(slope, square, _mm512_set1_ps(0.3986733853816986f));
    return _mm512_mul_ps(x, _mm512_fmadd_ps(near, slope, _mm512_set1_ps(0.5f)));
}

/* Rotate pairs of channels, each by the cosine and sine at the same index. */
INLINE __m512 turned(__m512 pairs, __m512 rotation)
{
    const __m512 cosine = _mm512_moveldup_ps(rotation), sine = _mm512_movehdup_ps(rotation);
    return _mm512_fmaddsub_ps(pairs, cosine, _mm512_mul_ps(_mm512_permute_ps(pairs, 0xB1), sine));
}

/* The steps of the layer, each for a block of 32 rows that begins at `first`. */

/* Compute queries, keys and values from rounded states. */
static void project(const Thread *thread, const Half *half, const Points *points, const uint16_t *states, Heads *heads,
                    int64_t first)
{
    const Layer *layer = thread->layer;
    const int64_t size = layer->size, width = size / layer->heads, columns = half->parts * size;
    const int64_t rows = whole(points->count, ROWS), values = columns - size, keys = values - size;
    const Side side = {states, size, size};
    multiply_into_sums(thread, &side, 1, half->project, columns);
    for (int64_t r = 0; r < ROWS; r++) {
        const int64_t row = first + r;
        float *sums = thread->sums + r * columns;
        const float *rotation =
            points->rotation && row < points->count ? points->rotation + row * width : NULL;
        for (int64_t c = 0; c < columns; c += TILE) {
            __m512 sum = _mm512_add_ps(_mm512_loadu_ps(sums + c), _mm512_loadu_ps(half->project_bias + c));
            if (rotation && c < values)
                sum = turned(sum, _mm512_loadu_ps(rotation + c % width));
            _mm512_storeu_ps(sums + c, sum);
            if (c < size)
                store_rounded(heads->query + row * size + c, sum);
            if (c >= keys && c < values) {
                /* The key is a column, so its pairs of channels are stored below each other. */
                uint32_t pairs[TILE / 2];
                store_rounded((uint16_t *)pairs, sum);
                const int64_t channel = c - keys, within = channel % width;
                uint32_t *place = (uint32_t *)(heads->key + channel / width * rows * width +
                                               row / TILE * TILE * width + within / PAIRS * PACKED) +
                                  within % PAIRS / 2 * TILE + row % TILE;
                for (int i = 0; i < TILE / 2; i++)
                    place[i * TILE] = pairs[i];
            }
        }
    }
    for (int64_t r = 0; r < ROWS; r += 2) {
        const int64_t row = first + r;
        const float *above = thread->sums + r * columns + values, *below = above + columns;
        for (int64_t c = 0; c < size; c += TILE) {
            const __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(above + c)));
            const __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(below + c)));
            uint16_t *place = heads->value + c / width * rows * width + c % width / TILE * TILE * rows +
                              row / PAIRS * PACKED + row % PAIRS / 2 * PAIRS;
            _mm512_storeu_si512(place, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
    }
}

/* Softmax weights of a row of similarities, not normalised, 0 beyond `count`. Returns their sum, the divisor. */
INLINE float weigh(float *similarities, int64_t count, int64_t rows, float scale, uint16_t *weights)
{
    for (int64_t c = count; c < rows; c++)
        similarities[c] = -__builtin_inff();
    __m512 most0 = _mm512_loadu_ps(similarities), most1 = _mm512_loadu_ps(similarities + TILE);
    for (int64_t c = PAIRS; c < rows; c += PAIRS) {
        most0 = _mm512_max_ps(most0, _mm512_loadu_ps(similarities + c));
        most1 = _mm512_max_ps(most1, _mm512_loadu_ps(similarities + c + TILE));
    }
    const __m512 factor = _mm512_set1_ps(scale);
    const __m512 offset = _mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(most0, most1)) * scale);
    __m512 total0 = _mm512_setzero_ps(), total1 = _mm512_setzero_ps();
    for (int64_t c = 0; c < rows; c += PAIRS) {
        const __m512 weight0 = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(similarities + c), factor, offset));
        const __m512 weight1 = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(similarities + c + TILE), factor, offset));
        total0 = _mm512_add_ps(total0, weight0);
        total1 = _mm512_add_ps(total1, weight1);
        _mm512_storeu_si512(weights + c, (__m512i)_mm512_cvtne2ps_pbh(weight1, weight0));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(total0, total1));
}

/* Messages of one head from a source to rows of a target. */
static void attend(const Thread *thread, const Heads *to, const Heads *from, int64_t count, int64_t head,
                   uint16_t *message, int64_t first)
{
    const int64_t size = thread->layer->size, width = size / thread->layer->heads, rows = whole(count, ROWS);
    const float scale = 1.4426950408889634f / __builtin_sqrtf((float)width); /* of the logarithm to base 2 */
    float totals[ROWS];
    const Side queries = {to->query + first * size + head * width, size, width};
    multiply_into_sums(thread, &queries, 1, from->key + head * rows * width, rows);
    for (int64_t r = 0; r < ROWS; r++)
        totals[r] = weigh(thread->sums + r * rows, count, rows, scale, thread->inputs + r * rows);
    const Side weights = {thread->inputs, rows, rows};
    multiply_into_sums(thread, &weights, 1, from->value + head * rows * width, width);
    for (int64_t r = 0; r < ROWS; r++) {
        const __m512 share = _mm512_set1_ps(1 / totals[r]);
        for (int64_t c = 0; c < width; c += TILE)
            store_rounded(message + (first + r) * size + head * width + c,
                          _mm512_mul_ps(_mm512_loadu_ps(thread->sums + r * width + c), share));
    }
}

/* States after a message: x plus the feed-forward network of x and message. `rounded` becomes the rounded states. */
static void feed_forward(const Thread *thread, const Half *half, int64_t count, const float *x, uint16_t *rounded,
                         const uint16_t *message, float *out, int64_t first)
{
    const int64_t size = thread->layer->size, wide = 2 * size;
    const Side both[2] = {{rounded + first * size, size, size}, {message + first * size, size, size}};
    multiply_into_sums(thread, both, 2, half->inner, wide);
    for (int64_t r = 0; r < ROWS; r++) {
        float *sums = thread->sums + r * wide;
        __m512 total = _mm512_setzero_ps();
        for (int64_t c = 0; c < wide; c += TILE) {
            const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(sums + c), _mm512_loadu_ps(half->inner_bias + c));
            total = _mm512_add_ps(total, sum);
            _mm512_storeu_ps(sums + c, sum);
        }
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / (float)wide);
        __m512 squares = _mm512_setzero_ps();
        for (int64_t c = 0; c < wide; c += TILE) {
            const __m512 difference = _mm512_sub_ps(_mm512_loadu_ps(sums + c), mean);
            squares = _mm512_fmadd_ps(difference, difference, squares);
        }
        const float variance = _mm512_reduce_add_ps(squares) / (float)wide;
        const __m512 inverse = _mm512_set1_ps(1 / __builtin_sqrtf(variance + half->epsilon));
        for (int64_t c = 0; c < wide; c += TILE) {
            const __m512 normal = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(sums + c), mean), inverse);
            const __m512 hidden =
                _mm512_fmadd_ps(normal, _mm512_loadu_ps(half->gain + c), _mm512_loadu_ps(half->shift + c));
            store_rounded(thread->inputs + r * wide + c, gelu(hidden));
        }
    }
    const Side hidden = {thread->inputs, wide, wide};
    multiply_into_sums(thread, &hidden, 1, half->outer, size);
    for (int64_t r = 0; r < ROWS && first + r < count; r++) {
        const int64_t row = (first + r) * size;
        for (int64_t c = 0; c < size; c += TILE) {
            const __m512 change = _mm512_add_ps(_mm512_loadu_ps(thread->sums + r * size + c),
                                                _mm512_loadu_ps(half->outer_bias + c));
            const __m512 state = _mm512_add_ps(_mm512_loadu_ps(x + row + c), change);
            _mm512_storeu_ps(out + row + c, state);
            store_rounded(rounded + row + c, state);
        }
    }
}

/* Rounded states at the input of the layer; 0 for the rows of a block beyond its points. */
static void load_states(const Thread *thread, const Points *points, uint16_t *rounded, int64_t first)
{
    const int64_t size = thread->layer->size;
    for (int64_t row = first; row < first + ROWS; row++)
        for (int64_t c = 0; c < size; c += TILE)
            store_rounded(rounded + row * size + c, row < points->count ? _mm512_loadu_ps(points->x + row * size + c)
                                                                       : _mm512_setzero_ps());
}

/* Numbers per row in the widest block, for `sums` and for `inputs`. */
static int64_t widest(const Layer *layer) { return largest(most_rows(layer, ROWS), 3 * layer->size); }

/* Size of the working memory, bytes. */
int64_t kpmatch_layer_work(const Layer *layer)
{
    const int64_t rows = whole(layer->points[0].count, ROWS) + whole(layer->points[1].count, ROWS);
    return 8 * rows * layer->size * (int64_t)sizeof(uint16_t) +
           layer->threads * ROWS * widest(layer) * (int64_t)(sizeof(float) + sizeof(uint16_t));
}

static void run_thread(const void *job, Team *team, int64_t number)
{
    const Layer *layer = job;
    char *work = layer->work;
    Thread own = {.layer = layer, .team = team, .number = number}, *thread = &own;
    Image *images = own.images;
    for (int i = 0; i < 2; i++) {
        const int64_t numbers = whole(layer->points[i].count, ROWS) * layer->size;
        images[i].rounded = taken(&work, numbers);
        images[i].message = taken(&work, numbers);
        images[i].within = (Heads){taken(&work, numbers), taken(&work, numbers), taken(&work, numbers)};
        images[i].across = (Heads){taken(&work, numbers), taken(&work, numbers), taken(&work, numbers)};
    }
    work += number * ROWS * widest(layer) * (int64_t)(sizeof(float) + sizeof(uint16_t));
    own.sums = (float *)taken(&work, 2 * ROWS * widest(layer));
    own.inputs = taken(&work, ROWS * widest(layer));
    for (int i = 0; i < 2; i++) {
        const Span rows = rows_of(layer, team, number, i, ROWS);
        for (int64_t first = rows.first; first < rows.end; first += ROWS) {
            load_states(thread, &layer->points[i], images[i].rounded, first);
            project(thread, &layer->within, &layer->points[i], images[i].rounded + first * layer->size,
                    &images[i].within, first);
        }
    }
    pthread_barrier_wait(&team->barrier);
    for (int i = 0; i < 2; i++) {
        const Points *points = &layer->points[i];
        const Points without_rotation = {points->count, NULL, NULL, NULL};
        const Image *image = &images[i];
        const Span rows = rows_of(layer, team, number, i, ROWS);
        for (int64_t head = 0; head < layer->heads; head++)
            for (int64_t first = rows.first; first < rows.end; first += ROWS)
                attend(thread, &image->within, &image->within, points->count, head, image->message, first);
        for (int64_t first = rows.first; first < rows.end; first += ROWS) {
            feed_forward(thread, &layer->within, points->count, points->x, image->rounded, image->message,
                         points->out, first);
            project(thread, &layer->across, &without_rotation, image->rounded + first * layer->size,
                    &images[i].across, first);
        }
    }
    pthread_barrier_wait(&team->barrier);
    for (int i = 0; i < 2; i++) {
        const Points *points = &layer->points[i];
        const Image *image = &images[i];
        const Span rows = rows_of(layer, team, number, i, ROWS);
        for (int64_t head = 0; head < layer->heads; head++)
            for (int64_t first = rows.first; first < rows.end; first += ROWS)
                attend(thread, &image->across, &images[1 - i].across, layer->points[1 - i].count, head,
                       image->message, first);
        for (int64_t first = rows.first; first < rows.end; first += ROWS)
            feed_forward(thread, &layer->across, points->count, points->out, image->rounded, image->message,
                         points->out, first);
    }
}

void kpmatch_layer(const Layer *layer) { work_together(layer->threads, layer->tiles, layer, run_thread); }

#else

int64_t kpmatch_layer_work(const void *layer) { return (void)layer, 0; }
void kpmatch_layer(const void *layer) { (void)layer; }

#endif
