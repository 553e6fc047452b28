// Runs a model with ONNX Runtime's C library: one thread, all graph optimizations, one float input, one output.
//
//   ort_runs MODEL RUNS INPUT OUTPUT DIM…
//
// Declares the entries of OrtApi that it needs by their place in the struct, which only grows
// (onnxruntime_c_api.h); the Python wheel holds the library without its header.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef void *status;
typedef struct {
    const void *const *(*api)(uint32_t version);
    const char *(*version)(void);
} Base;
const Base *OrtGetApiBase(void);

static const void *const *api;
#define CALL(index, ...) check(((status(*)())api[index])(__VA_ARGS__))
enum {
    GET_ERROR_MESSAGE = 2, CREATE_ENV = 3, CREATE_SESSION = 7, RUN = 9, CREATE_SESSION_OPTIONS = 10,
    SET_GRAPH_OPTIMIZATION_LEVEL = 23, SET_INTRA_OP_NUM_THREADS = 24, SET_INTER_OP_NUM_THREADS = 25,
    CREATE_TENSOR_WITH_DATA = 49, GET_TENSOR_DATA = 51, CREATE_CPU_MEMORY_INFO = 69
};

static void check(status s)
{
    if (s) {
        fprintf(stderr, "ort_runs: %s\n", ((const char *(*)(status))api[GET_ERROR_MESSAGE])(s));
        exit(1);
    }
}

int main(int argc, char **argv)
{
    if (argc < 6) {
        fprintf(stderr, "usage: ort_runs MODEL RUNS INPUT OUTPUT DIM...\n");
        return 2;
    }
    api = OrtGetApiBase()->api(16);
    int64_t shape[8], n = 1;
    size_t dims = 0;
    for (int i = 5; i < argc && dims < 8; i++)
        n *= shape[dims++] = atoll(argv[i]);
    float *x = malloc(n * sizeof *x);
    uint32_t seed = 7;
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 1664525 + 1013904223;
        x[i] = (float)(seed >> 8) / (1 << 23) - 1;
    }
    void *env, *options, *session, *memory, *input, *output = NULL;
    CALL(CREATE_ENV, 3 /* errors */, "count", &env);
    CALL(CREATE_SESSION_OPTIONS, &options);
    CALL(SET_GRAPH_OPTIMIZATION_LEVEL, options, 99 /* all */);
    CALL(SET_INTRA_OP_NUM_THREADS, options, 1);
    CALL(SET_INTER_OP_NUM_THREADS, options, 1);
    CALL(CREATE_SESSION, env, argv[1], options, &session);
    CALL(CREATE_CPU_MEMORY_INFO, 1 /* arena */, 0 /* default */, &memory);
    CALL(CREATE_TENSOR_WITH_DATA, memory, x, (size_t)(n * sizeof *x), shape, dims, 1 /* float */, &input);
    const char *inputs[] = {argv[3]}, *outputs[] = {argv[4]};
    void *values[] = {input};
    for (int i = atoi(argv[2]); i > 0; i--)
        CALL(RUN, session, NULL, inputs, values, (size_t)1, outputs, (size_t)1, &output);
    float *y;
    CALL(GET_TENSOR_DATA, output, (void **)&y);
    printf("%s: %g %g %g\n", OrtGetApiBase()->version(), y[0], y[1], y[2]);
    return 0;
}
