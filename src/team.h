/* A team of threads for one job.
 *
 * The threads end with the job. To multiply with tiles, include this file after networks.h.
 */
#ifndef KPMATCH_TEAM_H
#define KPMATCH_TEAM_H

#include <pthread.h>
#include <stdint.h>
#ifdef __x86_64__
#include <xmmintrin.h>
#endif

enum { MOST_THREADS = 64 };

typedef struct Team {
    pthread_mutex_t start; /* held until the number of threads is known */
    pthread_barrier_t barrier;
    int64_t count;
    int64_t tiles; /* whether they multiply with tiles */
    const void *job;
    void (*work)(const void *job, struct Team *team, int64_t number);
} Team;

typedef struct {
    Team *team;
    int64_t number;
} Member;

static void do_share(const Member *member)
{
    Team *team = member->team;
#if defined(KPMATCH_NETWORKS_H) && defined(KPMATCH_COMPILES)
    if (team->tiles) {
        struct {
            uint8_t palette, start_row, reserved[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        } shapes = {.palette = 1};
        for (int i = 0; i < 8; i++) {
            shapes.bytes[i] = 64;
            shapes.rows[i] = TILE;
        }
        finish_writing(&shapes);
        _tile_loadconfig(&shapes);
        team->work(team->job, team, member->number);
        _tile_release();
        return;
    }
#endif
    team->work(team->job, team, member->number);
}

static void *join_in(void *argument)
{
    Member *member = argument;
    pthread_mutex_lock(&member->team->start);
    pthread_mutex_unlock(&member->team->start);
#ifdef __x86_64__
    /* Denormal numbers are much slower on these processors, and do not matter here. They are treated as 0. */
    const unsigned int modes = _mm_getcsr();
    _mm_setcsr(modes | 0x8040);
    do_share(member);
    _mm_setcsr(modes);
#else
    do_share(member);
#endif
    return NULL;
}

/* Do a job with `threads` threads, or with fewer if the system cannot start more. */
static void work_together(int64_t threads, int64_t tiles, const void *job,
                          void (*work)(const void *job, Team *team, int64_t number))
{
    Team team = {.start = PTHREAD_MUTEX_INITIALIZER, .tiles = tiles, .job = job, .work = work};
    Member members[MOST_THREADS];
    pthread_t started[MOST_THREADS];
    pthread_mutex_lock(&team.start);
    for (int64_t i = 0; i < threads && i < MOST_THREADS; i++) {
        members[i] = (Member){&team, i};
        if (i > 0 && pthread_create(&started[i], NULL, join_in, &members[i]) != 0)
            break;
        team.count = i + 1;
    }
    pthread_barrier_init(&team.barrier, NULL, (unsigned int)team.count);
    pthread_mutex_unlock(&team.start);
    join_in(&members[0]);
    for (int64_t i = 1; i < team.count; i++)
        pthread_join(started[i], NULL);
    pthread_barrier_destroy(&team.barrier);
    pthread_mutex_destroy(&team.start);
}

#endif
