/* A pool of threads that run one call together, in phases, each of which is cut into pieces.

   A call is for example the whole step network, a phase one matrix product, an item one panel of its matrix. All threads
   run the same function, the call's task:

       begin_phase(worker, items, at_once);
       for (long i; (i = next_item(worker)) >= 0;) ...;
       end_phase(worker);

   Threads take pieces, of `at_once` neighbouring items, while there are any, so a thread on a slow core does fewer. A
   phase is over when its pieces are done, whoever did them. No thread waits for another *thread*: one that does not run,
   because another process has its core, stops nobody unless it has taken a piece. When it runs again, it passes quickly
   through all phases that are over.

   So a thread may still be inside a call that is over. It must not touch what the others use by then: every counter
   carries the number of its call, and a thread that finds another number takes no piece. It may still *read* the memory
   of its call. Each thread has its own copy of the argument, and pool_settle() waits until memory can be freed.
   Therefore only who has taken a piece writes into memory that threads share.

   The caller of pool_run() takes part. The other threads sleep between calls, after a short wait for the next one.
   Inside a call they do not sleep: it has hundreds of phases, and waking a thread takes longer than a phase.

   A thread that wakes up is kept off the CPU of the caller. In a virtual machine Linux let both run on the same CPU, while
   another one was idle: a decoder's call of 2 ms took 4 ms after every pause. Probably a guest of KVM takes an idle CPU
   for one that its host has taken away.

   fork() copies the pool into the new process, but none of its threads. There, the next pool_run() starts new ones, and
   pool_close() waits for none. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* for the CPUs of a thread */
#endif
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHUNKS_PER_THREAD 4     /* pieces of one product, where no thread is slowed down */
#define SPINS_BEFORE_YIELD 4000 /* after so many looks at a counter, a waiting thread lets other threads run */
#define SPINS_BEFORE_SLEEP 2000 /* after so many looks for the next call, a thread sleeps */
#define ARGUMENT_BYTES 512      /* the largest argument of a call */
#if defined(__aarch64__)
#define CACHE_LINE 128 /* of Apple's */
#else
#define CACHE_LINE 64
#endif

#if defined(__linux__)
typedef cpu_set_t Cpus;
#else
typedef int Cpus;
#endif

/* A thread, without the caller, as the pool sees it. Guarded by the pool's lock. */
typedef struct {
    int asleep;
    Cpus allowed; /* where it may run by what the system or the user has set, */
    Cpus set;     /* and what was made of that at its last waking: one CPU less */
} Sleeper;

/* Counters of one phase. The upper half of each is the number of the call, the lower half counts pieces. */
typedef struct {
    _Alignas(CACHE_LINE) atomic_uint_fast64_t taken;
    _Alignas(CACHE_LINE) atomic_uint_fast64_t done;
} Phase;

typedef struct Pool Pool;

/* One thread inside of a call. */
typedef struct {
    Pool *pool;
    int thread; /* 0 is the caller of pool_run() */
    uint64_t call;
    long phase;           /* index of the current phase; -1 before the first one */
    long items, at_once;  /* of the current phase; in this many pieces: */
    uint64_t pieces;      /* items / at_once, rounded up */
    long next, end;       /* the items of its piece that are still to do */
    uint64_t not_counted; /* pieces that it took and has not yet counted as done */
    _Alignas(CACHE_LINE) char argument[ARGUMENT_BYTES];
} Worker;

typedef void Task(Worker *worker, const void *argument);

struct Pool {
    int n_threads;
    int most_threads; /* that were asked for */
    pid_t process;    /* the process that has the threads */
    const void *kernels; /* that tasks use: chosen once, as reading the environment is not safe in a thread */
    pthread_t *threads; /* [most_threads]; entry 0 is the caller and is not used */
    Sleeper *sleepers;  /* [most_threads], as threads */
    Phase *phases;      /* [n_phases] */
    long n_phases;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    atomic_uint_fast64_t call; /* number of the last call; changed under the lock */
    /* Guarded by lock: */
    Task *task;           /* of the call that runs */
    const void *argument; /* of it; NULL where none runs */
    size_t argument_bytes;
    int closing;
    /* Threads inside a call, without the caller; raised under the lock. */
    atomic_int inside;
};

#define PIECES_OF(counter) ((counter) & 0xffffffffu)
#define CALL_OF(counter) ((counter) >> 32)

/* Some tens of nanoseconds in which the other thread of a core has it to itself. */
static inline void pause_core(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb"); /* "yield" takes no time on most of them */
#endif
}

static inline void spin_wait(int *spins) {
    if (++*spins < SPINS_BEFORE_YIELD) pause_core();
    else sched_yield();
}

/* How many neighbouring items of a phase a thread takes at a time. What it prefetches at the end of one panel is then
   the beginning of its next panel. */
static inline long items_at_once(const Pool *pool, long items) {
    long at_once = items / (pool->n_threads * CHUNKS_PER_THREAD);
    return at_once < 1 ? 1 : at_once;
}

/* The next phase, of items 0 .. items - 1. All threads must give the same numbers. */
static void begin_phase(Worker *worker, long items, long at_once) {
    if (++worker->phase >= worker->pool->n_phases) abort(); /* pool_run() was called with too few */
    worker->items = items, worker->at_once = at_once;
    worker->pieces = (uint64_t)((items + at_once - 1) / at_once);
    worker->next = worker->end = 0;
    worker->not_counted = 0;
}

/* An item of the current phase that no other thread does; -1 where none is left. */
static long next_item(Worker *worker) {
    if (worker->next < worker->end) return worker->next++;
    atomic_uint_fast64_t *counter = &worker->pool->phases[worker->phase].taken;
    uint_fast64_t taken = atomic_load_explicit(counter, memory_order_relaxed);
    do {
        if (CALL_OF(taken) != worker->call || PIECES_OF(taken) >= worker->pieces) return -1;
    } while (!atomic_compare_exchange_weak_explicit(counter, &taken, taken + 1, memory_order_relaxed,
                                                    memory_order_relaxed));
    long first = (long)PIECES_OF(taken) * worker->at_once, end = first + worker->at_once;
    worker->not_counted++;
    worker->next = first + 1;
    worker->end = end < worker->items ? end : worker->items;
    return first;
}

/* Returns once all pieces of the phase are done. This thread has done those that it took. */
static void end_phase(Worker *worker) {
    atomic_uint_fast64_t *counter = &worker->pool->phases[worker->phase].done;
    /* Until they are counted the call is not over, so this counts for no other call. */
    if (worker->not_counted) atomic_fetch_add_explicit(counter, worker->not_counted, memory_order_release);
    for (int spins = 0;;) {
        uint64_t done = atomic_load_explicit(counter, memory_order_acquire);
        if (CALL_OF(done) != worker->call || PIECES_OF(done) >= worker->pieces) return;
        spin_wait(&spins);
    }
}

typedef struct {
    Pool *pool;
    int thread;
} Start;

static void *worker_main(void *argument) {
    Start start = *(Start *)argument;
    free(argument);
    Pool *pool = start.pool;
    uint64_t seen = 0; /* number of the last call that this thread knows of */
    for (;;) {
        for (int spins = 0; atomic_load_explicit(&pool->call, memory_order_relaxed) == seen; spins++) {
            if (spins == SPINS_BEFORE_SLEEP) break;
            pause_core();
        }
        Worker worker;
        for (int spins = 0; pthread_mutex_trylock(&pool->lock); spin_wait(&spins)) {
        }
        pool->sleepers[start.thread].asleep = 1;
        while (pool->call == seen && !pool->closing) pthread_cond_wait(&pool->wake, &pool->lock);
        pool->sleepers[start.thread].asleep = 0;
        int closing = pool->closing, runs = pool->argument != NULL;
        Task *task = pool->task;
        seen = pool->call;
        if (runs) {
            memcpy(worker.argument, pool->argument, pool->argument_bytes);
            atomic_fetch_add(&pool->inside, 1);
        }
        pthread_mutex_unlock(&pool->lock);
        if (closing) return NULL;
        if (!runs) continue; /* that call is over */
        worker.pool = pool, worker.thread = start.thread, worker.call = seen, worker.phase = -1;
        task(&worker, worker.argument);
        atomic_fetch_sub_explicit(&pool->inside, 1, memory_order_release);
    }
}

/* Keeps threads that are asleep off the CPU of the caller. A set of CPUs that somebody else has given a thread since it
   woke up last is taken as it is, less that CPU. */
static void make_room(Pool *pool) {
#if defined(__linux__)
    int cpu = sched_getcpu();
    for (int i = 1; i < pool->n_threads; i++) {
        Sleeper *sleeper = pool->sleepers + i;
        Cpus now, less;
        if (!sleeper->asleep || cpu < 0 || pthread_getaffinity_np(pool->threads[i], sizeof now, &now)) continue;
        if (!CPU_EQUAL(&now, &sleeper->set)) sleeper->allowed = now;
        less = sleeper->allowed;
        if (cpu < CPU_SETSIZE) CPU_CLR(cpu, &less);
        if (!CPU_COUNT(&less)) less = sleeper->allowed; /* it has no other */
        if (!CPU_EQUAL(&now, &less) && pthread_setaffinity_np(pool->threads[i], sizeof less, &less)) continue;
        sleeper->set = less;
    }
#else
    (void)pool;
#endif
}

/* Blocks the signals that threads of the pool must not take; the caller's mask, which new threads inherit, goes to
   *before. A signal to the process goes to any thread that does not block it: a program that blocks one, and waits for it
   in a thread of its own, would be ended by it in one of ours. A thread's own faults are no such signals: blocked ones
   would end the process without a handler's report. */
static void block_signals(sigset_t *before) {
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT};
    sigset_t most;
    sigfillset(&most);
    for (unsigned i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&most, faults[i]);
    pthread_sigmask(SIG_SETMASK, &most, before);
}

/* Starts the threads, in this process: most_threads, or fewer where the system refuses to start more. */
static void pool_start(Pool *pool) {
    pool->process = getpid();
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    atomic_store(&pool->call, 0); /* as new threads expect it */
    pool->argument = NULL;
    pool->closing = 0;
    atomic_store(&pool->inside, 0);
    pool->n_threads = 1;
    if (pool->sleepers) memset(pool->sleepers, 0, (size_t)pool->most_threads * sizeof(Sleeper));
    sigset_t before;
    block_signals(&before);
    for (int i = 1; pool->threads && pool->sleepers && i < pool->most_threads; i++) {
        Start *start = malloc(sizeof(Start));
        if (!start) break;
        start->pool = pool, start->thread = i;
        if (pthread_create(&pool->threads[i], NULL, worker_main, start)) {
            free(start);
            break;
        }
        pool->n_threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* A pool of up to n_threads threads for tasks with these kernels. NULL where memory is exhausted. */
static Pool *pool_open(int n_threads, const void *kernels) {
    Pool *pool = calloc(1, sizeof(Pool));
    if (!pool) return NULL;
    pool->kernels = kernels;
    pool->most_threads = n_threads;
    pool->threads = calloc((size_t)n_threads, sizeof(pthread_t));
    pool->sleepers = calloc((size_t)n_threads, sizeof(Sleeper));
    pool_start(pool);
    return pool;
}

/* Returns when no thread is inside a call that is over. Memory that the call's threads could read may then be freed. */
static inline void pool_settle(Pool *pool) {
    if (pool->process != getpid()) return; /* its threads are another process's */
    for (int spins = 0; atomic_load_explicit(&pool->inside, memory_order_acquire);) spin_wait(&spins);
}

/* Runs a task on all threads, in at most `phases` phases. Returns 0 when the pieces of all of them are done, or -1
   where memory is exhausted. `argument`, of `bytes` bytes, is copied for each thread. */
static int pool_run(Pool *pool, Task *task, const void *argument, size_t bytes, long phases) {
    if (pool->process != getpid()) pool_start(pool);
    if (bytes > ARGUMENT_BYTES) abort();
    if (phases > pool->n_phases) {
        pool_settle(pool);
        Phase *larger = aligned_alloc(CACHE_LINE, (size_t)phases * sizeof(Phase));
        if (!larger) return -1;
        free(pool->phases);
        pool->phases = larger, pool->n_phases = phases;
    }
    Worker worker = {.pool = pool, .thread = 0, .phase = -1};
    memcpy(worker.argument, argument, bytes);
    worker.call = (pool->call + 1) & 0xffffffffu; /* no thread waits through 2^32 calls */
    for (long i = 0; i < phases; i++) {
        atomic_store_explicit(&pool->phases[i].taken, worker.call << 32, memory_order_relaxed);
        atomic_store_explicit(&pool->phases[i].done, worker.call << 32, memory_order_relaxed);
    }
    if (pool->n_threads > 1) {
        pthread_mutex_lock(&pool->lock);
        pool->task = task;
        pool->argument = worker.argument;
        pool->argument_bytes = bytes;
        atomic_store_explicit(&pool->call, worker.call, memory_order_release);
        make_room(pool);
        pthread_mutex_unlock(&pool->lock);
        pthread_cond_broadcast(&pool->wake); /* without the lock, which the threads that wake up take */
    } else atomic_store(&pool->call, worker.call);
    task(&worker, worker.argument);
    if (pool->n_threads > 1) {
        pthread_mutex_lock(&pool->lock);
        pool->argument = NULL; /* a thread that wakes up now does not enter */
        pthread_mutex_unlock(&pool->lock);
    }
    return 0;
}

/* The same, and returns when the caller may free what it gave. */
static inline int pool_run_settled(Pool *pool, Task *task, const void *argument, size_t bytes, long phases) {
    int failed = pool_run(pool, task, argument, bytes, phases);
    pool_settle(pool);
    return failed;
}

static void pool_close(Pool *pool) {
    if (pool->process == getpid()) {
        pthread_mutex_lock(&pool->lock);
        pool->closing = 1;
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
        for (int i = 1; i < pool->n_threads; i++) pthread_join(pool->threads[i], NULL);
        pthread_mutex_destroy(&pool->lock);
        pthread_cond_destroy(&pool->wake);
    } /* else the threads are another process's: joining them, or destroying what they wait for, would wait for ever */
    free(pool->threads);
    free(pool->sleepers);
    free(pool->phases);
    free(pool);
}

/* Closes *held, unless it is NULL. It is NULL before the first thread ends, so that it is closed once, whatever the
   caller does when this returns. */
static inline void pool_take(void **held) {
    Pool *pool = *held;
    *held = NULL;
    if (pool) pool_close(pool);
}
