/* The threads of torch's own OpenMP, used only while they pay; part of svdq.c, which includes it once.
 *
 * A region ends when its last thread has. Where another process has a core, that thread comes when the system
 * lets it, milliseconds later, and everybody has waited for nothing: its work was long done by the others,
 * who take pieces as they are free. So each region is timed. One that took longer than all its work would
 * have taken alone is followed by regions on one thread, twice as many after each that is late again; then
 * the threads are tried once more. No result depends on it: sums have one order. */

#include <pthread.h>
#include <time.h>

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);
static Parallel *run_parallel; /* GOMP_parallel of the OpenMP that torch has loaded; NULL: one thread */

enum { FEWEST_ALONE = 8, MOST_ALONE = 512 };
enum { UNTIMED = 50000 };  /* nanoseconds: what starting and ending a region takes at most, if all is quiet */
static int64_t alone_next; /* regions that come and are run on one thread */
static int64_t alone = FEWEST_ALONE; /* how many of them follow a late region */

EXPORT void svdq_use_openmp(void *gomp_parallel) {
    run_parallel = (Parallel *)(uintptr_t)gomp_parallel;
    __atomic_store_n(&alone_next, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&alone, FEWEST_ALONE, __ATOMIC_RELAXED);
}

static int64_t nanoseconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

typedef struct {
    void (*work)(void *);
    void *what;
    pthread_t caller;
    int64_t worked; /* by the caller, while it had a core */
} Region;

static void work_timed(void *given) {
    Region *region = given;
    if (!pthread_equal(pthread_self(), region->caller)) {
        region->work(region->what);
        return;
    }
    int64_t started = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    region->work(region->what);
    region->worked += nanoseconds(CLOCK_THREAD_CPUTIME_ID) - started;
}

/* What a region says of the next ones. */
static void judge(int64_t worked, int64_t took, int64_t threads) {
    int64_t pause = __atomic_load_n(&alone, __ATOMIC_RELAXED);
    if (took <= threads * worked + UNTIMED) {
        if (pause != FEWEST_ALONE) __atomic_store_n(&alone, FEWEST_ALONE, __ATOMIC_RELAXED);
        return;
    }
    __atomic_store_n(&alone_next, pause, __ATOMIC_RELAXED);
    __atomic_store_n(&alone, pause < MOST_ALONE ? 2 * pause : pause, __ATOMIC_RELAXED);
}

static void in_parallel(void (*work)(void *), void *what, int64_t threads) {
    if (!run_parallel || threads < 2) {
        work(what);
        return;
    }
    if (__atomic_load_n(&alone_next, __ATOMIC_RELAXED) > 0) {
        __atomic_fetch_sub(&alone_next, 1, __ATOMIC_RELAXED);
        work(what);
        return;
    }
    Region region = {work, what, pthread_self(), 0};
    int64_t started = nanoseconds(CLOCK_MONOTONIC);
    run_parallel(work_timed, &region, (unsigned)threads, 0);
    judge(region.worked, nanoseconds(CLOCK_MONOTONIC) - started, threads);
}
