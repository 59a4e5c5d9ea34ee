/* The calls as XLA's foreign functions: https://openxla.org/xla/custom_call.
 *
 * The structures are those of the stable binary interface, major version 0, as far as a call needs them, so the
 * library is built without jaxlib's headers.  A function is called in one of two ways: to ask for its version, or to
 * be run with buffers and one attribute, "layout", which _backend/jax/_c_kernels.py makes: the number of the function,
 * how many integers the structure begins with, these, and for each buffer in order its offset in the structure times
 * two, plus one where a kj_tensor stands there. */

typedef struct ffi_extension {
  size_t size;
  int type; /* 1: metadata */
  struct ffi_extension *next;
} ffi_extension;

typedef struct {
  size_t size;
  ffi_extension *extension;
  int major, minor;
} ffi_version;

typedef struct {
  ffi_extension base;
  struct {
    size_t size;
    ffi_version version;
    uint32_t traits;
    int64_t state_type;
  } *metadata;
} ffi_metadata;

typedef struct {
  size_t size;
  ffi_extension *extension;
  int dtype; /* 11: float32, 10: float16, 16: bfloat16 */
  void *data;
  int64_t rank, *dims;
} ffi_buffer;

typedef struct { /* of arguments, or of results */
  size_t size;
  ffi_extension *extension;
  int64_t count;
  int *types;
  ffi_buffer **buffers;
} ffi_buffers;

typedef struct {
  int dtype;
  size_t count;
  const int64_t *data;
} ffi_integers;

typedef struct {
  size_t size;
  ffi_extension *extension;
  const char *message;
  int code;
} ffi_error;

typedef struct {
  size_t size;
  ffi_extension *extension;
  void *context;
  void (*work)(void *);
  void *data;
} ffi_work;

typedef struct {
  size_t size;
  ffi_extension *extension;
  ffi_version version;
  const void *internal;
  void *(*create_error)(ffi_error *);
  void *others[10];
  void *(*schedule)(ffi_work *); /* from a later minor version: present if the size includes it */
} ffi_api;

typedef struct {
  size_t size;
  ffi_extension *extension;
  const ffi_api *api;
  void *context;
  int stage;
  ffi_buffers arguments, results;
  struct {
    size_t size;
    ffi_extension *extension;
    int64_t count;
    int *types;
    void **names;
    void **values;
  } attributes;
} ffi_call;

static void place(char *structure, int64_t code, const ffi_buffer *buffer) {
  int64_t size = 1;
  for (int64_t i = 0; i < buffer->rank; i++) size *= buffer->dims[i];
  void *data = size ? buffer->data : NULL; /* an empty buffer stands for None */
  if (code % 2) {
    int dtype = buffer->dtype == 11 ? KJ_FLOAT32 : buffer->dtype == 10 ? KJ_FLOAT16 : KJ_BFLOAT16;
    kj_tensor tensor = {data, dtype, buffer->rank ? buffer->dims[buffer->rank - 1] : 0};
    memcpy(structure + code / 2, &tensor, sizeof tensor);
  } else {
    memcpy(structure + code / 2, &data, sizeof data);
  }
}

/* XLA's threads: new threads would compete with them for the cores. */
static int schedule(const void *given, void (*work)(void *), void *data) {
  const ffi_call *call = given;
  ffi_work task = {sizeof task, NULL, call->context, work, data};
  return call->api->schedule(&task) != NULL;
}

void *kj_xla(const ffi_call *call) {
  if (call->extension && call->extension->type == 1) {
    ffi_version *version = &((ffi_metadata *)call->extension)->metadata->version;
    version->major = 0;
    version->minor = 1; /* newer members are not used */
    return NULL;
  }
  union {
    kj_scan scan;
    kj_conv conv;
    kj_experts experts;
    kj_attention attention;
  } structure = {0};
  const int64_t *layout = ((const ffi_integers *)call->attributes.values[0])->data;
  int64_t function = layout[0], integers = layout[1];
  const int64_t *codes = layout + 2 + integers;
  memcpy(&structure, layout + 2, integers * sizeof(int64_t));
  for (int64_t i = 0; i < call->arguments.count; i++) place((char *)&structure, *codes++, call->arguments.buffers[i]);
  for (int64_t i = 0; i < call->results.count; i++) place((char *)&structure, *codes++, call->results.buffers[i]);
  kj_pool pool = {schedule, call};
  const kj_pool *threads = call->api->size >= sizeof(ffi_api) ? &pool : NULL;
  int error;
  if (function < 2) {
    structure.scan.pool = threads;
    error = (function ? kj_scan_backward : kj_scan_forward)(&structure.scan);
  } else if (function < 4) {
    structure.conv.pool = threads;
    error = (function == 3 ? kj_conv_backward : kj_conv_forward)(&structure.conv);
  } else if (function > 5) {
    structure.attention.pool = threads;
    error = kj_attention_forward(&structure.attention);
  } else {
    structure.experts.pool = threads;
    error = kj_experts_forward(&structure.experts);
  }
  if (!error) return NULL;
  ffi_error failure = {sizeof failure, NULL, "keras_jamba: not enough memory, or no such instruction set", 8};
  return call->api->create_error(&failure);
}
