/* A CUDA that pretends: one device of compute capability 9.0 whose memory is the host's and whose kernels do nothing.
 *
 * It takes the place of the driver, the runtime, cuBLAS and cuDNN, so that the real CUDA provider of onnxruntime-gpu loads
 * graphs, places their nodes, inserts its copies, decides about CUDA graph capture and runs through bindings on a machine
 * without a GPU. What is computed is nonsense; where it is computed, and what is asked of the device meanwhile, is what a
 * GPU would see: calls are counted, and the N-th of a kind fails on request. Calls that a real stream capture forbids
 * fail during a capture.
 *
 * standin_count(kind)      calls so far; standin_live() allocations not given back, standin_reset() starts counting again
 * standin_fail(kind, n)    the n-th call from now fails, and those after it, until standin_reset(); 0: none does
 */
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum kind { MALLOC, FREE, HOST_MALLOC, HOST_FREE, TO_DEVICE, TO_HOST, ON_DEVICE, LAUNCH, CAPTURE, REPLAY, KINDS };
static const char *const names[KINDS] = {
    "malloc", "free", "host_malloc", "host_free", "to_device", "to_host", "on_device", "launch", "capture", "replay"};
static long counts[KINDS], failing[KINDS], live;
static int capturing;
static __thread cudaError_t last; /* stays until it is asked for, as CUDA's does */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int token; /* stands for every stream, event, graph, handle and descriptor */
#define HANDLE(p) (*(void **)(p) = &token)
#define OK return cudaSuccess
#define API cudaError_t

static int kind_of(const char *name) {
    for (int kind = 0; kind < KINDS; kind++)
        if (!strcmp(names[kind], name)) return kind;
    return -1;
}
long standin_count(const char *name) { return kind_of(name) < 0 ? -1 : counts[kind_of(name)]; }
long standin_live(void) { return live; }
void standin_reset(void) { memset(counts, 0, sizeof counts), memset(failing, 0, sizeof failing); }
__attribute__((constructor)) static void fail_from_the_start(void) { /* STANDIN_FAIL=kind: its first call, those after it */
    const char *name = getenv("STANDIN_FAIL");
    for (int kind = 0; name && kind < KINDS; kind++) failing[kind] = !strcmp(names[kind], name);
}
void standin_fail(const char *name, long n) { if (kind_of(name) >= 0) failing[kind_of(name)] = n; }

static API counted(enum kind kind, API failure) {
    pthread_mutex_lock(&lock);
    counts[kind]++;
    int fails = failing[kind] && (failing[kind] == 1 || !--failing[kind]);
    pthread_mutex_unlock(&lock);
    if (fails) last = failure;
    return fails ? failure : cudaSuccess;
}
static API forbidden_while_capturing(void) { return capturing ? last = cudaErrorStreamCaptureUnsupported : cudaSuccess; }
#define UNLESS(call) { API problem = (call); if (problem) return problem; }

/* the device */
API cudaGetDeviceCount(int *n) {
    const char *code = getenv("STANDIN_DRIVER"); /* what a driver without use says: 35 too old, 100 no device */
    *n = !code;
    return code ? last = atoi(code) : cudaSuccess;
}
API cudaGetDevice(int *d) { *d = 0; OK; }
API cudaSetDevice(int d) { return d ? last = cudaErrorInvalidDevice : cudaSuccess; }
API cudaDeviceSynchronize(void) { return forbidden_while_capturing(); }
API cudaDriverGetVersion(int *v) { *v = 13000; OK; }
API cudaRuntimeGetVersion(int *v) { *v = 13000; OK; }
API cudaGetLastError(void) { API found = last; last = cudaSuccess; return found; }
API cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorString(API e) { return e == cudaErrorMemoryAllocation ? "out of memory" : "the stand-in refuses"; }
const char *cudaGetErrorName(API e) { return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError"; }
API cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "stand-in 9.0");
    p->major = 9;
    p->totalGlobalMem = 80ul << 30;
    p->multiProcessorCount = 132;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->warpSize = 32;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->regsPerBlock = 65536;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->l2CacheSize = 50 << 20;
    OK;
}
API cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
    *v = a == cudaDevAttrComputeCapabilityMajor ? 9 : a == cudaDevAttrMultiProcessorCount ? 132
       : a == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448 : a == cudaDevAttrMaxThreadsPerBlock ? 1024 : 0;
    OK;
}
API cudaGetDriverEntryPointByVersion(const char *s, void **f, unsigned v, unsigned long long g,
                                     enum cudaDriverEntryPointQueryResult *r) { return cudaErrorNotSupported; }

/* memory: the host's, all zeros at first */
static API taken(enum kind kind, void **p, size_t n) {
    UNLESS(forbidden_while_capturing());
    UNLESS(counted(kind, cudaErrorMemoryAllocation));
    n = n ? (n + 255) / 256 * 256 : 256;
    *p = memset(aligned_alloc(256, n), 0, n);
    __sync_fetch_and_add(&live, 1);
    OK;
}
static API given_back(enum kind kind, void *p) {
    counted(kind, cudaSuccess);
    if (p) __sync_fetch_and_sub(&live, 1);
    free(p);
    OK;
}
API cudaMalloc(void **p, size_t n) { return taken(MALLOC, p, n); }
API cudaMallocFromPoolAsync(void **p, size_t n, cudaMemPool_t m, cudaStream_t t) { return taken(MALLOC, p, n); }
API cudaFree(void *p) { return given_back(FREE, p); }
API cudaFreeAsync(void *p, cudaStream_t t) { return given_back(FREE, p); }
API cudaMallocHost(void **p, size_t n) { return taken(HOST_MALLOC, p, n); }
API cudaHostAlloc(void **p, size_t n, unsigned f) { return taken(HOST_MALLOC, p, n); }
API cudaFreeHost(void *p) { return given_back(HOST_FREE, p); }
API cudaMemGetInfo(size_t *f, size_t *t) { *f = 70ul << 30; *t = 80ul << 30; OK; }
API cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeDevice;
    OK;
}

static API copied(void *d, const void *s, size_t n, enum cudaMemcpyKind k) {
    enum kind kind = k == cudaMemcpyHostToDevice ? TO_DEVICE : k == cudaMemcpyDeviceToHost ? TO_HOST : ON_DEVICE;
    if (kind != ON_DEVICE) UNLESS(forbidden_while_capturing());
    UNLESS(counted(kind, cudaErrorIllegalAddress));
    memmove(d, s, n);
    OK;
}
API cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) { return copied(d, s, n, k); }
API cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k, cudaStream_t t) { return copied(d, s, n, k); }
API cudaMemset(void *d, int v, size_t n) { memset(d, v, n); OK; }
API cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t t) { memset(d, v, n); OK; }

/* streams, events, graphs */
API cudaStreamCreate(cudaStream_t *s) { HANDLE(s); OK; }
API cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { HANDLE(s); OK; }
API cudaStreamSynchronize(cudaStream_t s) { return forbidden_while_capturing(); }
API cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) {
    *c = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    OK;
}
API cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) {
    UNLESS(counted(CAPTURE, cudaErrorUnknown));
    capturing = 1;
    OK;
}
API cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) { capturing = 0; HANDLE(g); OK; }
API cudaEventCreate(cudaEvent_t *e) { HANDLE(e); OK; }
API cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) { HANDLE(e); OK; }
API cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1; OK; }
API cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long f) { HANDLE(e); OK; }
API cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) { return counted(REPLAY, cudaErrorLaunchFailure); }
API cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) { f(data); OK; }

/* kernels: nothing happens */
API cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->binaryVersion = a->ptxVersion = 90;
    OK;
}
static API launched(void) { return counted(LAUNCH, cudaErrorLaunchFailure); }
API cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) { return launched(); }
API cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return launched(); }
API cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) { return launched(); }
API __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) { return launched(); }
API cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned g) { *n = 2; OK; }
API __cudaGetKernel(cudaKernel_t *k, const void *f) { HANDLE(k); OK; }
API __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *s, void *t) {
    *g = *b = (dim3){1, 1, 1};
    *s = 0, *(void **)t = 0;
    OK;
}
void **__cudaRegisterFatBinary(void *b) { static void *binary; return &binary; }

/* what creates something */
#define CREATES(name) int name(void **h) { HANDLE(h); return 0; }
CREATES(cublasCreate_v2) CREATES(cublasLtCreate) CREATES(cublasLtMatmulDescCreate) CREATES(cublasLtMatmulPreferenceCreate)
CREATES(cublasLtMatrixLayoutCreate) CREATES(cublasLtMatrixTransformDescCreate) CREATES(cudnnCreate)
CREATES(cudnnCreateTensorDescriptor) CREATES(cudnnCreateFilterDescriptor) CREATES(cudnnCreateRNNDescriptor)
CREATES(cudnnCreateRNNDataDescriptor) CREATES(cudnnCreateDropoutDescriptor) CREATES(cudnnCreateReduceTensorDescriptor)
CREATES(cudnnCreateActivationDescriptor)
int cublasGetMathMode(void *h, int *m) { *m = 0; return 0; }
const char *cublasGetStatusName(int s) { return "a status of the stand-in"; }
const char *cublasGetStatusString(int s) { return "a status of the stand-in"; }
/* one way is found to do the product: the first bytes of a result are the algorithm, after it size, state, waves */
int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *r, void *p, int n, void *results, int *found) {
    memset(results, 0, 64);
    *found = 1;
    return 0;
}

/* cuDNN: sizes where it is asked for them */
size_t cudnnGetVersion(void) { return 92000; }
const char *cudnnGetErrorString(int s) { return "a status of the stand-in"; }
int cudnnDropoutGetStatesSize(void *h, size_t *n) { *n = 256; return 0; }
int cudnnGetReductionWorkspaceSize(void *h, void *r, void *a, void *c, size_t *n) { *n = 256; return 0; }
int cudnnGetReductionIndicesSize(void *h, void *r, void *a, void *c, size_t *n) { *n = 256; return 0; }
int cudnnGetRNNTempSpaceSizes(void *h, void *r, int m, void *x, size_t *w, size_t *s) { *w = *s = 256; return 0; }
int cudnnGetRNNWeightParams(void *h, void *r, int layer, size_t n, void *space, int id, void *md, void **m, void *bd, void **b) {
    *m = *b = space;
    return 0;
}
int cudnnGetTensorNdDescriptor(void *t, int n, int *type, int *dims, int *sizes, int *strides) {
    *type = 0, *dims = 1;
    for (int i = 0; i < n; i++) sizes[i] = strides[i] = 1;
    return 0;
}
int cudnnRNNForward() { return launched(); }
int cudnnReduceTensor() { return launched(); }
int cudnnSoftmaxForward() { return launched(); }

/* products */
#define PRODUCT(name) int name() { return launched() ? 13 : 0; }
PRODUCT(cublasSgemm_v2) PRODUCT(cublasGemmEx) PRODUCT(cublasSgemmStridedBatched) PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmBatched) PRODUCT(cublasGemmBatchedEx) PRODUCT(cublasSgeam) PRODUCT(cublasScopy_v2)
PRODUCT(cublasSscal_v2) PRODUCT(cublasLtMatmul) PRODUCT(cublasLtMatrixTransform)

/* what needs no answer, and what this project's graphs never ask for */
int standin_nothing(void) { return 0; }
#define NOTHING(name) __asm__(".globl " #name "\n.type " #name ", @function\n.set " #name ", standin_nothing");
NOTHING(cudaStreamDestroy) NOTHING(cudaStreamWaitEvent) NOTHING(cudaEventDestroy) NOTHING(cudaEventRecord)
NOTHING(cudaEventRecordWithFlags) NOTHING(cudaEventSynchronize) NOTHING(cudaGraphDestroy) NOTHING(cudaGraphExecDestroy)
NOTHING(cudaFuncSetAttribute) NOTHING(cudaKernelSetAttributeForDevice) NOTHING(cudaLibraryGetKernel)
NOTHING(cudaLibraryLoadData) NOTHING(cudaLibraryUnload) NOTHING(cudaMemPoolCreate) NOTHING(cudaMemPoolDestroy)
NOTHING(cudaMemPoolGetAttribute) NOTHING(cudaMemPoolSetAttribute) NOTHING(cudaMemPoolTrimTo) NOTHING(cudaMemcpy2DAsync)
NOTHING(cudaMemcpyFromSymbol) NOTHING(cuTensorMapEncodeTiled) NOTHING(__cudaPushCallConfiguration)
NOTHING(__cudaRegisterFatBinaryEnd) NOTHING(__cudaRegisterFunction) NOTHING(__cudaRegisterVar)
NOTHING(__cudaUnregisterFatBinary) NOTHING(cublasDestroy_v2) NOTHING(cublasSetStream_v2) NOTHING(cublasSetMathMode)
NOTHING(cublasSetWorkspace_v2) NOTHING(cublasDgeam) NOTHING(cublasDgemmBatched) NOTHING(cublasDgemmStridedBatched)
NOTHING(cublasDgemm_v2) NOTHING(cublasDgetrfBatched) NOTHING(cublasDgetriBatched) NOTHING(cublasSgetrfBatched)
NOTHING(cublasSgetriBatched) NOTHING(cublasLtDestroy) NOTHING(cublasLtMatmulAlgoConfigSetAttribute)
NOTHING(cublasLtMatmulAlgoInit) NOTHING(cublasLtMatmulDescDestroy) NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulPreferenceDestroy) NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutDestroy) NOTHING(cublasLtMatrixLayoutSetAttribute)
NOTHING(cublasLtMatrixTransformDescDestroy) NOTHING(cudnnDestroy) NOTHING(cudnnSetStream)
NOTHING(cudnnSetTensorNdDescriptor) NOTHING(cudnnDestroyTensorDescriptor) NOTHING(cudnnSetFilterNdDescriptor)
NOTHING(cudnnDestroyFilterDescriptor) NOTHING(cudnnSetRNNDescriptor_v8) NOTHING(cudnnDestroyRNNDescriptor)
NOTHING(cudnnSetRNNDataDescriptor) NOTHING(cudnnDestroyRNNDataDescriptor) NOTHING(cudnnSetDropoutDescriptor)
NOTHING(cudnnDestroyDropoutDescriptor) NOTHING(cudnnSetReduceTensorDescriptor) NOTHING(cudnnDestroyReduceTensorDescriptor)
NOTHING(cudnnSetActivationDescriptor) NOTHING(cudnnDestroyActivationDescriptor) NOTHING(cudnnGetLastErrorString)
