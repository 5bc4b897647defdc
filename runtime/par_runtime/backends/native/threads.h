/* A pool of threads that run one task together: a barrier, and a counter from which they take the pieces of a phase.

   The task is the whole step network. It consists of phases (for example one matrix product), each phase of pieces (for
   example the panels of its matrix). All threads run the same code and share the pieces of a phase by next_piece() or
   next_panel(), so a thread on a slow core does fewer. barrier() ends a phase. The caller of pool_run() is thread 0.
   The other threads sleep between tasks. Inside a task they do not: it has hundreds of phases, and waking a thread
   takes longer than a phase.

   fork() copies the pool into the new process, but none of its threads. There, the next pool_run() starts new ones, and
   pool_close() waits for none. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#define CHUNKS_PER_THREAD 4     /* of one product, where no thread is slowed down */
#define SPINS_BEFORE_YIELD 4000 /* after so many looks at a counter, a waiting thread lets other threads run */

typedef struct Pool Pool;
typedef void Task(Pool *pool, const void *argument, int thread);

struct Pool {
    int n_threads;
    int most_threads; /* that were asked for */
    pid_t process;    /* the process that has the threads */
    Task *task;
    pthread_t *threads; /* [most_threads]; entry 0 is the caller and is not used */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    /* Guarded by lock: */
    const void *argument;
    int64_t task_number;
    int closing;
    /* Shared inside of a task: */
    atomic_long next; /* first piece of the phase that no thread has taken */
    atomic_int arrived;
    atomic_long phase;
};

static void spin_wait(int *spins) {
    if (++*spins < SPINS_BEFORE_YIELD) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    } else {
        sched_yield();
    }
}

/* Returns once every thread has called it. The last thread to arrive opens the next phase. */
static void barrier(Pool *pool) {
    long phase = atomic_load(&pool->phase);
    if (atomic_fetch_add(&pool->arrived, 1) == pool->n_threads - 1) {
        atomic_store(&pool->arrived, 0);
        atomic_store(&pool->next, 0);
        atomic_store(&pool->phase, phase + 1);
    } else {
        int spins = 0;
        while (atomic_load_explicit(&pool->phase, memory_order_acquire) == phase) spin_wait(&spins);
    }
}

/* A piece of the current phase that no other thread does: 0, 1, 2, ... without an end. */
static long next_piece(Pool *pool) { return atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed); }

/* The next panel for this thread, of `n_panels`; -1 where none is left. `last` is the panel that it did before, -1 at
   first. A thread takes several neighbouring panels at a time: what it prefetches at the end of one panel is then the
   beginning of its next panel. */
static long next_panel(Pool *pool, long n_panels, long last) {
    long chunk = n_panels / (pool->n_threads * CHUNKS_PER_THREAD);
    if (chunk < 1) chunk = 1;
    if (last >= 0 && (last + 1) % chunk && last + 1 < n_panels) return last + 1;
    long first = next_piece(pool) * chunk;
    return first < n_panels ? first : -1;
}

typedef struct {
    Pool *pool;
    int thread;
} Worker;

static void *worker_main(void *argument) {
    Worker worker = *(Worker *)argument;
    free(argument);
    Pool *pool = worker.pool;
    int64_t done = 0; /* number of the last task that this thread ran */
    for (;;) {
        pthread_mutex_lock(&pool->lock);
        while (pool->task_number == done && !pool->closing) pthread_cond_wait(&pool->wake, &pool->lock);
        int closing = pool->closing;
        const void *task_argument = pool->argument;
        done = pool->task_number;
        pthread_mutex_unlock(&pool->lock);
        if (closing) return NULL;
        pool->task(pool, task_argument, worker.thread);
    }
}

/* Starts the threads, in this process: most_threads, or fewer where the system refuses to start more. */
static void pool_start(Pool *pool) {
    pool->process = getpid();
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->task_number = 0; /* as new threads expect it */
    pool->closing = 0;
    atomic_store(&pool->next, 0);
    atomic_store(&pool->arrived, 0);
    atomic_store(&pool->phase, 0);
    pool->n_threads = 1;
    for (int i = 1; pool->threads && i < pool->most_threads; i++) {
        Worker *worker = malloc(sizeof(Worker));
        if (!worker) break;
        worker->pool = pool, worker->thread = i;
        if (pthread_create(&pool->threads[i], NULL, worker_main, worker)) {
            free(worker);
            break;
        }
        pool->n_threads++;
    }
}

/* A pool of up to n_threads threads. NULL where memory is exhausted. */
static Pool *pool_open(int n_threads, Task *task) {
    Pool *pool = calloc(1, sizeof(Pool));
    if (!pool) return NULL;
    pool->task = task;
    pool->most_threads = n_threads;
    pool->threads = calloc((size_t)n_threads, sizeof(pthread_t));
    pool_start(pool);
    return pool;
}

/* Runs the task on all threads. The last phase ends with a barrier too, so all work is done when this returns. */
static void pool_run(Pool *pool, const void *argument) {
    if (pool->process != getpid()) pool_start(pool);
    atomic_store(&pool->next, 0);
    pthread_mutex_lock(&pool->lock);
    pool->argument = argument;
    pool->task_number++;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    pool->task(pool, argument, 0);
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
    free(pool);
}
