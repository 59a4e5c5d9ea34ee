/* The tasks of one call, and the threads that do them. */

/* State that the threads of one call share.  It outlives the call if a thread starts late: the backend's threads may
 * busy-wait for other work, and a call does not wait for a thread that has not begun. */
typedef struct {
  const kj_set *set;
  const kj_scan *scan; /* one of the four */
  const kj_conv *conv;
  const kj_experts *experts;
  const kj_plan *plan; /* of the experts */
  const kj_attention *attention;
  const kj_spread *spread; /* of the attention */
  int backward, step; /* step: a scan of one token, forward */
  int64_t rows, shares, strips, length, tasks;
  int64_t bytes[5]; /* of a thread: work, state, replayed, sums, grad_rates */
  kj_task shared;   /* the common part of all tasks; partial_B and partial_C of the first share */
  atomic_llong next;
  atomic_int users, failed;
  pthread_mutex_t lock; /* of `done` */
  pthread_cond_t all_done;
  int64_t done;
} kj_job;

static void *align(void *p) { return (void *)(((uintptr_t)p + 63) & ~(uintptr_t)63); }

static int64_t rounded(int64_t bytes) { return (bytes + 127) / 64 * 64; }

/* Flushes subnormal numbers to zero: they do not affect results, and can take a hundred times as long. */
static unsigned flush_subnormals(void) {
#if HAVE_X86
  unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  return before;
#else
  return 0;
#endif
}

static void restore(unsigned before) {
#if HAVE_X86
  _mm_setcsr(before);
#endif
}

static void clear_unreal(const kj_job *job, const kj_task *task) {
  const uint8_t *mask = job->scan ? job->scan->mask : job->conv->mask;
  int64_t e = job->scan ? job->scan->channels : job->conv->channels;
  int64_t first = task->first * WIDEST, last = task->last * WIDEST;
  if (last > e) last = e;
  if (!mask) return;
  for (int64_t t = 0; t < job->length; t++) {
    int64_t token = task->row * job->length + t;
    if (mask[token]) continue;
    if (job->conv) {
      put_zeros(job->backward ? job->conv->grad_x : job->conv->y, token, first, last - first);
    } else if (!job->backward) {
      put_zeros(job->scan->y, token, first, last - first);
    } else {
      put_zeros(job->scan->grad_u, token, first, last - first);
      put_zeros(job->scan->grad_delta, token, first, last - first);
      put_zeros(job->scan->grad_z, token, first, last - first);
      int64_t n = job->scan->states;
      memset(task->partial_B + token * n, 0, n * sizeof(float));
      memset(task->partial_C + token * n, 0, n * sizeof(float));
    }
  }
}

static void do_task(kj_job *job, kj_task task, int64_t number, char *memory, int32_t *index) {
  if (job->experts) {
    job->set->experts(job->experts, job->plan, number, (float *)memory);
    return;
  }
  if (job->attention) {
    job->set->attention(job->attention, job->spread, number, (float *)memory);
    return;
  }
  int64_t share = number % job->shares;
  task.row = number / job->shares;
  task.first = job->strips * share / job->shares;
  task.last = job->strips * (share + 1) / job->shares;
  void **places[] = {&task.work, &task.state, &task.replayed, &task.sums, &task.grad_rates};
  for (int i = 0; i < 5; i++) {
    *places[i] = memory;
    memory += job->bytes[i];
  }
  if (job->conv) {
    task.tokens = begin_row(task.row, job->length, job->conv->mask, job->conv->segments, index);
    clear_unreal(job, &task);
    job->set->conv(job->conv, &task, job->backward);
    return;
  }
  int64_t per_share = job->rows * job->length * job->scan->states;
  if (job->backward) {
    task.partial_B += share * per_share;
    task.partial_C += share * per_share;
  }
  task.tokens = begin_row(task.row, job->length, job->scan->mask, job->scan->segments, index);
  task.tokens.states = job->scan->states;
  task.tokens.B = (float *)memory;
  task.tokens.C = task.tokens.B + CHUNK * job->scan->states;
  clear_unreal(job, &task);
  void (*scan)(const kj_scan *, const kj_task *) = job->step ? job->set->scan_step : job->set->scan_forward;
  (job->backward ? job->set->scan_backward : scan)(job->scan, &task);
}

static void let_go(kj_job *job) {
  if (--job->users) return;
  pthread_mutex_destroy(&job->lock);
  pthread_cond_destroy(&job->all_done);
  free(job);
}

/* Runs tasks until none is left.  Before it has a task, it may read only the job itself. */
static void work_through(kj_job *job) {
  int64_t number = job->next++, finished = 0, bytes = 64;
  if (number >= job->tasks) return;
  int64_t states = job->scan ? job->scan->states : 0;
  for (int i = 0; i < 5; i++) bytes += job->bytes[i];
  char *memory = malloc(bytes + 2 * CHUNK * states * sizeof(float));
  int32_t *index = malloc(job->length * sizeof(int32_t));
  int enough = memory && index;
  unsigned before = flush_subnormals();
  for (; number < job->tasks; number = job->next++, finished++) {
    if (enough) do_task(job, job->shared, number, align(memory), index);
    else job->failed = 1;
  }
  restore(before);
  free(memory);
  free(index);
  pthread_mutex_lock(&job->lock);
  job->done += finished;
  if (job->done == job->tasks) pthread_cond_signal(&job->all_done);
  pthread_mutex_unlock(&job->lock);
}

static void in_team(void *job) { work_through(job); }

static void help(void *job) {
  work_through(job);
  let_go(job);
}

static void *helper(void *job) {
  help(job);
  return NULL;
}

static int start_thread(kj_job *job, const pthread_attr_t *detached, const kj_pool *pool) {
  pthread_t started;
  return pool ? pool->start(pool->context, help, job) : pthread_create(&started, detached, helper, job);
}

/* Runs all tasks on up to `threads` threads, including this one; it ignores threads that fail to start. */
static int run(const kj_job *planned, int64_t threads, kj_parallel parallel, const kj_pool *pool) {
  kj_job *job = malloc(sizeof *job);
  pthread_attr_t detached;
  if (!job) return KJ_NO_MEMORY;
  memcpy(job, planned, sizeof *job);
  job->tasks = job->rows * job->shares;
  job->users = 1;
  pthread_mutex_init(&job->lock, NULL);
  pthread_cond_init(&job->all_done, NULL);
  if (parallel && threads > 1) {
    parallel(in_team, job, (unsigned)threads, 0);
    threads = 1; /* nothing is left to do */
  }
  if (threads > job->tasks) threads = job->tasks;
  pthread_attr_init(&detached);
  pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
  for (int64_t i = 1; i < threads; i++) {
    job->users++;
    if (start_thread(job, &detached, pool)) {
      job->users--;
      break;
    }
  }
  pthread_attr_destroy(&detached);
  work_through(job);
  pthread_mutex_lock(&job->lock);
  while (job->done < job->tasks) pthread_cond_wait(&job->all_done, &job->lock);
  pthread_mutex_unlock(&job->lock);
  int failed = job->failed;
  let_go(job);
  return failed ? KJ_NO_MEMORY : KJ_OK;
}

/* Returns the number of threads that pay off, at 0.3 nanoseconds per unit: 70 microseconds of work for a new thread, 7
 * for one of a waiting team. */
static int64_t useful_threads(int64_t threads, int64_t units, kj_parallel parallel) {
  int64_t most = units / 250000 + 1;
  if (parallel) most = units > 25000 ? threads : 1; /* OpenMP ends the threads that a smaller team omits */
  return threads < 1 ? 1 : threads < most ? threads : most;
}

/* Returns the number of shares of the channels that keeps all threads busy to the end. */
static int64_t shares_for(int64_t threads, int64_t rows, int64_t strips) {
  if (threads == 1 || rows % threads == 0 || rows >= 8 * threads) return 1;
  int64_t shares = (4 * threads + rows - 1) / rows;
  if (rows < threads && threads % rows == 0) shares = threads / rows;
  return shares < strips ? shares : strips;
}
