/* Latency of MPI_Allreduce and MPI_Allgather on floats, measured as crates/comm-core/benches/host_latency.rs measures
 * the host backend: the same sizes, batches and calls, buffers with the same alignment, advice on huge pages and order of
 * first touches. Prints "op bytes microseconds" lines: bytes are those of the receive buffer, the time is the median over
 * batches of the slowest rank's mean. */

#define _GNU_SOURCE
#include <mpi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { BATCHES = 9, LARGEST = 64 << 20 };

static int calls(long bytes) {
    long n = (8L << 20) / bytes;
    return n < 2 ? 2 : n > 200 ? 200 : (int)n;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int wrong(int reduce, const float *found, int count, int size) {
    int part = count / size;
    float ranks = (float)(size * (size - 1) / 2);
    for (int i = 0; i < part * size; i++) {
        float right = reduce ? ranks + (float)size * (float)(i % 1000) : (float)(i / part) + (float)(i % part % 1000);
        if (found[i] != right) return 1;
    }
    return 0;
}

/* What HostMemory::allocate does in crates/comm-core/src/memory.rs. */
static float *buffer(void) {
    const uintptr_t huge = 2 << 20;
    char *start = aligned_alloc(256, LARGEST);
    if (!start) MPI_Abort(MPI_COMM_WORLD, 1);
    uintptr_t first = ((uintptr_t)start + huge - 1) & ~(huge - 1), end = ((uintptr_t)start + LARGEST) & ~(huge - 1);
    if (end > first) madvise((void *)first, end - first, MADV_HUGEPAGE);
    memset(start, 0, LARGEST);
    return (float *)start;
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    int rank, size;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    float *send = buffer(), *recv = buffer();
    for (int i = 0; i < LARGEST / 4; i++) send[i] = (float)rank + (float)(i % 1000);
    for (int reduce = 1; reduce >= 0; reduce--) {
        for (long bytes = 1024; bytes <= LARGEST; bytes *= 4) {
            int count = (int)(bytes / 4), n = calls(bytes);
            double times[BATCHES], slowest[BATCHES];
            for (int batch = -1; batch < BATCHES; batch++) {
                MPI_Barrier(MPI_COMM_WORLD);
                double start = MPI_Wtime();
                for (int i = 0; i < n; i++) {
                    if (reduce)
                        MPI_Allreduce(send, recv, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
                    else
                        MPI_Allgather(send, count / size, MPI_FLOAT, recv, count / size, MPI_FLOAT, MPI_COMM_WORLD);
                }
                if (batch >= 0) times[batch] = (MPI_Wtime() - start) * 1e6 / n;
            }
            MPI_Reduce(times, slowest, BATCHES, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
            if (wrong(reduce, recv, count, size)) {
                fprintf(stderr, "wrong result at %ld bytes\n", bytes);
                MPI_Abort(MPI_COMM_WORLD, 1);
            }
            if (rank == 0) {
                qsort(slowest, BATCHES, sizeof(double), ascending);
                printf("%s %ld %.2f\n", reduce ? "all_reduce" : "all_gather", bytes, slowest[BATCHES / 2]);
                fflush(stdout);
            }
        }
    }
    free(send);
    free(recv);
    MPI_Finalize();
    return 0;
}
