// A CUDA driver of two devices whose memory is the host's and whose work is done at once: as much of one as the typed
// calls' tests ask of cudarc. What it is given back it must have given.

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, INVALID_DEVICE = 101, DEVICES = 2, MOST = 4096 };

static char contexts[DEVICES];
static __thread void* current;

int cuInit(unsigned flags) { return OK; }
int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal < DEVICES ? OK : INVALID_DEVICE;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = 1;
    return OK;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = &contexts[device];
    return OK;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return OK; }
int cuCtxGetCurrent(void** context) {
    *context = current;
    return OK;
}
int cuCtxSetCurrent(void* context) {
    current = context;
    return OK;
}
int cuCtxSynchronize(void) { return OK; }

// What exists: streams, events and memory.
static void* live[MOST];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int swap(void* from, void* to) {
    int found = INVALID_VALUE;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST && found != OK; i++) {
        if (live[i] == from) {
            live[i] = to;
            found = OK;
        }
    }
    pthread_mutex_unlock(&lock);
    return found;
}
static int make(void** made, size_t bytes) {
    *made = malloc(bytes ? bytes : 1);
    return swap(NULL, *made);
}
static int destroy(void* made) {
    int known = made ? swap(made, NULL) : INVALID_VALUE;
    if (known == OK) free(made);
    return known;
}
// Nothing is known of the default stream but that it is there.
static int exists(void* made) { return made ? swap(made, made) : OK; }

int cuStreamCreate(void** stream, unsigned flags) { return make(stream, 1); }
int cuStreamDestroy_v2(void* stream) { return destroy(stream); }
int cuStreamSynchronize(void* stream) { return exists(stream); }
int cuStreamWaitEvent(void* stream, void* event, unsigned flags) {
    return exists(stream) == OK ? exists(event) : INVALID_VALUE;
}
int cuEventCreate(void** event, unsigned flags) { return make(event, 1); }
int cuEventDestroy_v2(void* event) { return destroy(event); }
int cuEventQuery(void* event) { return exists(event); }
int cuEventRecord(void* event, void* stream) { return exists(stream) == OK ? exists(event) : INVALID_VALUE; }

int cuMemAllocAsync(uint64_t* at, size_t bytes, void* stream) {
    void* memory;
    int made = make(&memory, bytes);
    *at = (uint64_t)memory;
    return made;
}
int cuMemFreeAsync(uint64_t at, void* stream) { return destroy((void*)at); }
int cuMemsetD8Async(uint64_t at, unsigned char value, size_t bytes, void* stream) {
    memset((void*)at, value, bytes);
    return exists(stream);
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    memcpy((void*)to, from, bytes);
    return exists(stream);
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    memcpy(to, (void*)from, bytes);
    return exists(stream);
}
