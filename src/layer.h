/* Arguments of a LightGlue layer, for any precision. Include this file after team.h. */
#ifndef KPMATCH_LAYER_H
#define KPMATCH_LAYER_H

/* The arguments: structures of compiled.py, with the same names. Its functions describe how weights are packed. */

typedef struct {
    const void *project; /* queries; keys, unless they are equal to the queries; values */
    const float *project_bias;
    const void *inner; /* the two linear layers of the feed-forward network, with the normalisation between them */
    const float *inner_bias;
    const float *gain;
    const float *shift;
    const void *outer;
    const float *outer_bias;
    int64_t parts; /* 3; 2 if the keys are the queries */
    float epsilon;
} Half;

typedef struct {
    int64_t count;
    const float *x;        /* (count, size) */
    const float *rotation; /* (count, size / heads / 2, 2): cosine and sine */
    float *out;            /* (count, size) */
} Points;

typedef struct {
    int64_t size, heads, threads, tiles;
    Half within, across;
    Points points[2];
    void *work; /* working memory of the size that the precision's function returns, aligned to 64 bytes */
} Layer;

typedef struct {
    int64_t first, end;
} Span;

/* A thread's rows of an image. The blocks of rows of both images are distributed evenly over the threads. */
static Span rows_of(const Layer *layer, const Team *team, int64_t number, int image, int64_t block)
{
    const int64_t blocks0 = whole(layer->points[0].count, block) / block;
    const int64_t all = blocks0 + whole(layer->points[1].count, block) / block;
    const int64_t first = all * number / team->count, end = all * (number + 1) / team->count;
    const int64_t start = image ? blocks0 : 0, stop = image ? all : blocks0;
    const Span span = {block * ((first > start ? first : start) - start), block * ((end < stop ? end : stop) - start)};
    return span;
}

static int64_t most_rows(const Layer *layer, int64_t block)
{
    return whole(largest(layer->points[0].count, layer->points[1].count), block);
}

#endif
