/* A layer of LightGlue (kpmatch_ros/models/lightglue_layers.py) in float32, for AVX2.
 *
 * As in lightglue.c, which computes the same in bfloat16 on processors that support it, a block of rows passes through
 * all operations of a layer in the processor's cache. test/test_compiled_layers.py compares it with PyTorch.
 */
#include "avx2.h"

#ifdef KPMATCH_COMPILES
#include "team.h"
#include "layer.h"

enum {
    TOGETHER = 6, /* rows whose sums fit into the registers, for 16 columns */
    ROWS = 24,    /* of a block: a multiple of TOGETHER */
    COLUMNS = 16, /* columns of a matrix that are packed together */
    APART = 16    /* numbers between rows, so that they do not begin at the same cache lines */
};

/* The data of an image between the steps of a layer. All arrays have whole blocks of rows. */
typedef struct {
    float *query; /* (rows, size) */
    float *key;   /* of each head, packed as the right side of a product with queries */
    float *value; /* of each head, packed as the right side of a product with weights */
} Heads;

typedef struct {
    float *both; /* (rows, 2 size): states and messages */
    Heads within, across;
} Image;

typedef struct {
    const Layer *layer;
    Image images[2];
    Team *team;
    int64_t number; /* of this thread */
    float *sums;    /* for a block of rows, as wide as the widest product */
    float *hidden;  /* (ROWS, 2 size + APART) */
} Thread;

/* Products of 6 rows and 16 packed columns. A packed matrix has, for each 16 columns, rows of 16 numbers. */
static __attribute__((noinline)) void multiply_block(const float *rows, int64_t stride, int64_t depth,
                                                     const float *columns, float *sums, int64_t sums_stride)
{
    __m256 total[TOGETHER][2];
#pragma GCC unroll 6
    for (int r = 0; r < TOGETHER; r++)
        total[r][0] = total[r][1] = _mm256_setzero_ps();
    for (int64_t i = 0; i < depth; i++) {
        const __m256 left = _mm256_loadu_ps(columns + i * COLUMNS), right = _mm256_loadu_ps(columns + i * COLUMNS + 8);
#pragma GCC unroll 6
        for (int r = 0; r < TOGETHER; r++) {
            const __m256 same = _mm256_broadcast_ss(rows + r * stride + i);
            total[r][0] = _mm256_fmadd_ps(same, left, total[r][0]);
            total[r][1] = _mm256_fmadd_ps(same, right, total[r][1]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < TOGETHER; r++) {
        _mm256_storeu_ps(sums + r * sums_stride, total[r][0]);
        _mm256_storeu_ps(sums + r * sums_stride + 8, total[r][1]);
    }
}

/* Sums (ROWS, columns) of a block of rows times a packed matrix with `pitch` rows for each 16 columns. */
static void multiply(const float *rows, int64_t stride, int64_t depth, const float *packed, int64_t pitch,
                     int64_t columns, float *sums, int64_t sums_stride)
{
    for (int64_t n = 0; n < columns; n += COLUMNS)
        for (int64_t r = 0; r < ROWS; r += TOGETHER)
            multiply_block(rows + r * stride, stride, depth, packed + n * pitch, sums + r * sums_stride + n,
                           sums_stride);
}

/* Rotate pairs of channels, each by the cosine and sine at the same index. */
INLINE __m256 turned(__m256 pairs, __m256 rotation)
{
    const __m256 cosine = _mm256_moveldup_ps(rotation), sine = _mm256_movehdup_ps(rotation);
    return _mm256_fmaddsub_ps(pairs, cosine, _mm256_mul_ps(_mm256_permute_ps(pairs, 0xB1), sine));
}

/* The steps of the layer, each for a block of rows that begins at `first`. */

/* Compute queries, keys and values from states. */
static void project(const Thread *thread, const Half *half, const Points *points, const float *states, Heads *heads,
                    int64_t first)
{
    const Layer *layer = thread->layer;
    const int64_t size = layer->size, width = size / layer->heads, columns = half->parts * size;
    const int64_t rows = whole(points->count, ROWS), values = columns - size, keys = values - size;
    multiply(states, 2 * size, size, half->project, size, columns, thread->sums, columns);
    for (int64_t r = 0; r < ROWS; r++) {
        const int64_t row = first + r;
        const float *sums = thread->sums + r * columns;
        const float *rotation = points->rotation && row < points->count ? points->rotation + row * width : NULL;
        for (int64_t c = 0; c < columns; c += 8) {
            __m256 sum = _mm256_add_ps(_mm256_loadu_ps(sums + c), _mm256_loadu_ps(half->project_bias + c));
            if (rotation && c < values)
                sum = turned(sum, _mm256_loadu_ps(rotation + c % width));
            if (c < size)
                _mm256_storeu_ps(heads->query + row * size + c, sum);
            if (c >= keys && c < values) {
                float numbers[8];
                const int64_t channel = c - keys;
                float *place = heads->key + channel / width * whole(rows, COLUMNS) * width +
                               row / COLUMNS * COLUMNS * width + channel % width * COLUMNS + row % COLUMNS;
                _mm256_storeu_ps(numbers, sum);
                for (int i = 0; i < 8; i++)
                    place[i * COLUMNS] = numbers[i];
            }
            if (c >= values) {
                const int64_t channel = c - values;
                _mm256_storeu_ps(heads->value + channel / COLUMNS * rows * COLUMNS + row * COLUMNS + channel % COLUMNS,
                                 sum);
            }
        }
    }
}

/* Replace a row of similarities by softmax weights, not normalised. Returns their sum, the divisor. */
INLINE float weigh(float *similarities, int64_t count, float scale)
{
    const __m256 lowest = _mm256_set1_ps(-__builtin_inff()), factor = _mm256_set1_ps(scale);
    const int64_t end = whole(count, 16);
    for (int64_t c = count; c < end; c++)
        similarities[c] = -__builtin_inff();
    __m256 most0 = lowest, most1 = lowest;
    for (int64_t c = 0; c < end; c += 16) {
        most0 = _mm256_max_ps(most0, _mm256_loadu_ps(similarities + c));
        most1 = _mm256_max_ps(most1, _mm256_loadu_ps(similarities + c + 8));
    }
    const __m256 offset = _mm256_set1_ps(largest_of(_mm256_max_ps(most0, most1)) * scale);
    __m256 total0 = _mm256_setzero_ps(), total1 = total0;
    for (int64_t c = 0; c < end; c += 16) {
        const __m256 weight0 = power_of_two(_mm256_fmsub_ps(_mm256_loadu_ps(similarities + c), factor, offset));
        const __m256 weight1 = power_of_two(_mm256_fmsub_ps(_mm256_loadu_ps(similarities + c + 8), factor, offset));
        total0 = _mm256_add_ps(total0, weight0);
        total1 = _mm256_add_ps(total1, weight1);
        _mm256_storeu_ps(similarities + c, weight0);
        _mm256_storeu_ps(similarities + c + 8, weight1);
    }
    return sum_of(_mm256_add_ps(total0, total1));
}

/* Messages of one head from a source to rows of a target, stored next to their states. */
static void attend(const Thread *thread, const Heads *to, const Heads *from, int64_t count, int64_t head, float *both,
                   int64_t first)
{
    const int64_t size = thread->layer->size, width = size / thread->layer->heads, rows = whole(count, ROWS);
    const int64_t columns = whole(count, COLUMNS), stride = columns + APART;
    const float scale = 1.4426950408889634f / __builtin_sqrtf((float)width); /* of the logarithm to base 2 */
    float *message = both + first * 2 * size + size + head * width;
    float totals[ROWS];
    multiply(to->query + first * size + head * width, size, width, from->key + head * whole(rows, COLUMNS) * width,
             width, columns, thread->sums, stride);
    for (int64_t r = 0; r < ROWS; r++)
        totals[r] = weigh(thread->sums + r * stride, count, scale);
    multiply(thread->sums, stride, count, from->value + head * rows * width, rows, width, message, 2 * size);
    for (int64_t r = 0; r < ROWS; r++) {
        const __m256 share = _mm256_set1_ps(1 / totals[r]);
        for (int64_t c = 0; c < width; c += 8) {
            float *place = message + r * 2 * size + c;
            _mm256_storeu_ps(place, _mm256_mul_ps(_mm256_loadu_ps(place), share));
        }
    }
}

/* States after a message: x plus the feed-forward network of `both`. The new states become the first half of `both`. */
static void feed_forward(const Thread *thread, const Half *half, int64_t count, float *both, float *out, int64_t first)
{
    const int64_t size = thread->layer->size, wide = 2 * size, stride = wide + APART;
    multiply(both + first * wide, wide, wide, half->inner, wide, wide, thread->hidden, stride);
    for (int64_t r = 0; r < ROWS; r++) {
        float *hidden = thread->hidden + r * stride;
        __m256 total = _mm256_setzero_ps(), squares = total;
        for (int64_t c = 0; c < wide; c += 8) {
            const __m256 sum = _mm256_add_ps(_mm256_loadu_ps(hidden + c), _mm256_loadu_ps(half->inner_bias + c));
            total = _mm256_add_ps(total, sum);
            _mm256_storeu_ps(hidden + c, sum);
        }
        const __m256 mean = _mm256_set1_ps(sum_of(total) / (float)wide);
        for (int64_t c = 0; c < wide; c += 8) {
            const __m256 difference = _mm256_sub_ps(_mm256_loadu_ps(hidden + c), mean);
            squares = _mm256_fmadd_ps(difference, difference, squares);
        }
        const float variance = sum_of(squares) / (float)wide;
        const __m256 inverse = _mm256_set1_ps(1 / __builtin_sqrtf(variance + half->epsilon));
        for (int64_t c = 0; c < wide; c += 8) {
            const __m256 normal = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(hidden + c), mean), inverse);
            _mm256_storeu_ps(hidden + c, gelu(_mm256_fmadd_ps(normal, _mm256_loadu_ps(half->gain + c),
                                                              _mm256_loadu_ps(half->shift + c))));
        }
    }
    multiply(thread->hidden, stride, wide, half->outer, wide, size, thread->sums, size);
    for (int64_t r = 0; r < ROWS; r++) {
        float *states = both + (first + r) * wide;
        for (int64_t c = 0; c < size; c += 8) {
            const __m256 change = _mm256_add_ps(_mm256_loadu_ps(thread->sums + r * size + c),
                                                _mm256_loadu_ps(half->outer_bias + c));
            const __m256 state = _mm256_add_ps(_mm256_loadu_ps(states + c), change);
            _mm256_storeu_ps(states + c, state);
            if (first + r < count && out)
                _mm256_storeu_ps(out + (first + r) * size + c, state);
        }
    }
}

/* States at the input of the layer; 0 for the rows of a block beyond its points. */
static void load_states(const Thread *thread, const Points *points, float *both, int64_t first)
{
    const int64_t size = thread->layer->size;
    for (int64_t row = first; row < first + ROWS; row++)
        if (row < points->count)
            memcpy(both + row * 2 * size, points->x + row * size, (size_t)size * sizeof *both);
        else
            memset(both + row * 2 * size, 0, (size_t)size * sizeof *both);
}

/* Size of an image's states, messages and heads, in numbers. */
static int64_t image_work(const Layer *layer, int i)
{
    const int64_t rows = whole(layer->points[i].count, ROWS);
    return (6 * rows + 2 * whole(rows, COLUMNS)) * layer->size;
}

/* Size of a thread's own working memory, in numbers. */
static int64_t thread_work(const Layer *layer)
{
    const int64_t widest = largest(whole(most_rows(layer, ROWS), COLUMNS) + APART, 3 * layer->size);
    return ROWS * (widest + 2 * layer->size + APART);
}

/* Size of the working memory, bytes. */
int64_t kpmatch_float_layer_work(const Layer *layer)
{
    return (image_work(layer, 0) + image_work(layer, 1) + layer->threads * thread_work(layer)) * (int64_t)sizeof(float);
}

static Heads heads_at(float *work, int64_t rows, int64_t size)
{
    const Heads heads = {work, work + 2 * rows * size, work + rows * size};
    return heads;
}

static void run_thread(const void *job, Team *team, int64_t number)
{
    const Layer *layer = job;
    const int64_t size = layer->size;
    float *work = layer->work;
    Thread own = {.layer = layer, .team = team, .number = number}, *thread = &own;
    Image *images = own.images;
    for (int i = 0; i < 2; i++) {
        const int64_t rows = whole(layer->points[i].count, ROWS), heads = (2 * rows + whole(rows, COLUMNS)) * size;
        images[i].both = work;
        images[i].within = heads_at(work + 2 * rows * size, rows, size);
        images[i].across = heads_at(work + 2 * rows * size + heads, rows, size);
        work += image_work(layer, i);
    }
    own.hidden = work + number * thread_work(layer);
    own.sums = own.hidden + ROWS * (2 * size + APART);
    for (int i = 0; i < 2; i++) {
        const Span rows = rows_of(layer, team, number, i, ROWS);
        for (int64_t first = rows.first; first < rows.end; first += ROWS) {
            load_states(thread, &layer->points[i], images[i].both, first);
            project(thread, &layer->within, &layer->points[i], images[i].both + first * 2 * size, &images[i].within,
                    first);
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
                attend(thread, &image->within, &image->within, points->count, head, image->both, first);
        for (int64_t first = rows.first; first < rows.end; first += ROWS) {
            feed_forward(thread, &layer->within, points->count, image->both, NULL, first);
            project(thread, &layer->across, &without_rotation, image->both + first * 2 * size, &images[i].across,
                    first);
        }
    }
    pthread_barrier_wait(&team->barrier);
    for (int i = 0; i < 2; i++) {
        const Points *points = &layer->points[i];
        const Image *image = &images[i];
        const Span rows = rows_of(layer, team, number, i, ROWS);
        for (int64_t head = 0; head < layer->heads; head++)
            for (int64_t first = rows.first; first < rows.end; first += ROWS)
                attend(thread, &image->across, &images[1 - i].across, layer->points[1 - i].count, head, image->both,
                       first);
        for (int64_t first = rows.first; first < rows.end; first += ROWS)
            feed_forward(thread, &layer->across, points->count, image->both, points->out, first);
    }
}

void kpmatch_float_layer(const Layer *layer) { work_together(layer->threads, 0, layer, run_thread); }

#else

int64_t kpmatch_float_layer_work(const void *layer) { return (void)layer, 0; }
void kpmatch_float_layer(const void *layer) { (void)layer; }

#endif
