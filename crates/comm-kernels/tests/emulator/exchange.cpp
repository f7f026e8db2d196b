// Random sequences of the exchange kernels, between 2 to 8 ranks of random speed, compared with what they must give; then
// what a rank does that its host has hushed.
//
//     exchange FROM TO: a sequence for each world and seed. WORLDS(X) lists the worlds: X(2) X(3), say.
#include <unistd.h>

#include "gpu.h"
// After it: the kernels, with their memory instructions replaced.
#include "p2p/gather.cuh"
#include "p2p/line_sums.cuh"
#include "p2p/reduce.cuh"

using namespace p2p;

namespace {

char* aligned(std::vector<char>& memory, uint64_t to) {
    return reinterpret_cast<char*>((reinterpret_cast<uint64_t>(memory.data()) + to - 1) / to * to);
}

constexpr uint32_t kSlots = 3 * kBurstPacks;
enum Kind { kPackets, kLamport, kLines, kKinds };

// One rank's end of the three channels.
struct Rank {
    std::vector<char> memory[kKinds];
    Channel channel[kKinds] = {};
    uint32_t broken = 0, abort = 0;
    ErrorRecord error = {};

    // Lines of 128 bytes must not lie across two.
    char* area(int kind) { return aligned(memory[kind], 128); }
};

struct World {
    std::vector<Rank> ranks;

    World(int world, uint32_t first) : ranks(world) {
        gpu::scratch.clear();
        for (Rank& rank : ranks) {
            for (int kind = 0; kind < kKinds; kind++) {
                const size_t buffer = size_t(kind == kLines ? 1 : kStages) * world * kSlots * kPackBytes;
                const size_t bytes = kFlagBytes + kBuffers * buffer;
                rank.memory[kind].resize(bytes + 128);
                char* const area = rank.area(kind);
                gpu::scratch.push_back({area, bytes});
                fill(area, kFlagBytes, first - 1);
                for (uint32_t b = 0; b < kBuffers; b++)
                    fill(area + kFlagBytes + b * buffer, buffer, kind == kLamport ? Lamport::kMark : ~b);
                rank.channel[kind].round = first;
            }
        }
    }
    // As if all flags had last been raised before round 0, and packs and lines had come until just now.
    void forget_flags() {
        for (Rank& rank : ranks)
            for (int kind = 0; kind < kKinds; kind++) fill(rank.area(kind), kFlagBytes, uint32_t(-1));
    }
    void go_on_from(uint32_t round) {
        for (Rank& rank : ranks)
            for (Channel& channel : rank.channel) channel.round = round;
    }
    void lift(std::mt19937& random) {
        std::vector<std::vector<gpu::Launch>> launches(ranks.size());
        for (int rank = 0; rank < int(ranks.size()); rank++)
            for (Kind kind : {kPackets, kLamport, kLines})
                launches[rank].push_back({2, 32, [this, rank, kind] {
                                              const Link own = link(rank, kind);
                                              const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
                                              for (uint32_t i = first; i < kFlagBytes / 4; i += 64) lift_flag(own, i);
                                          }});
        gpu::run(launches, random);
    }
    static void fill(char* at, size_t bytes, uint32_t value) {
        for (size_t i = 0; i < bytes; i += 4) std::memcpy(at + i, &value, 4);
    }
    Link link(int rank, Kind kind) {
        Link link = {};
        for (size_t r = 0; r < ranks.size(); r++) link.scratch[r] = ranks[r].area(kind);
        Rank& own = ranks[rank];
        link.channel = &own.channel[kind], link.broken = &own.broken, link.abort = &own.abort, link.error = &own.error;
        link.timeout_ns = 100'000'000'000, link.rank = uint32_t(rank), link.slot_packs = kSlots;
        return link;
    }
};

enum Op {
    kGatherPackets,
    kGatherLines,
    kBroadcast1,
    kBroadcast2,
    kBroadcastLines,
    kScatterPacks,
    kScatterLines,
    kReduce1,
    kReduce1Lamport,
    kReduce2,
    kOps
};

struct Call {
    Op op;
    size_t bytes;  // of a rank's part, or of the whole
    int root;
    uint32_t blocks, threads;
    bool in_place;
    size_t shift;  // of the operands, from an aligned address

    bool gathers() const { return op == kGatherPackets || op == kGatherLines; }
    bool scatters() const { return op == kScatterPacks || op == kScatterLines; }
    bool broadcasts() const { return op == kBroadcast1 || op == kBroadcast2 || op == kBroadcastLines; }
    size_t sent(int world) const { return scatters() ? bytes * world : bytes; }
    size_t received(int world) const { return gathers() ? bytes * world : bytes; }
};

Call any_call(std::mt19937& random, int world) {
    static constexpr uint32_t kShapes[][2] = {{1, 32}, {2, 32}, {3, 32}, {1, 64}, {1, 96}};
    Call call;
    call.op = Op(random() % kOps);
    call.root = int(random() % world);
    const auto& shape = kShapes[random() % 5];
    call.blocks = shape[0], call.threads = shape[1];
    call.in_place = random() % 2;
    call.shift = random() % 3 == 0 ? 4 : 0;
    const size_t elements[] = {1 + random() % 16, 1 + random() % 500, kBurstBytes / 4 * (1 + random() % 14),
                               1 + random() % 6000};
    call.bytes = 4 * elements[random() % 4];
    // As much as one launch of them takes.
    const size_t threads = call.blocks * call.threads;
    if (call.op == kBroadcast1) call.bytes = min(call.bytes, 24 * threads);
    if (call.op == kBroadcast2) call.bytes = min(call.bytes, 24 * threads * max(world - 1, 1));
    if (call.op == kReduce1) call.bytes = min(call.bytes, size_t(12) * kSlots);
    if (call.op == kReduce1Lamport) call.bytes = min(call.bytes, size_t(16) * kSlots);
    return call;
}

template <int kWorld>
void launch(World& world, int rank, const Call& call, char* send, char* recv) {
    const Link packets = world.link(rank, kPackets), lamport = world.link(rank, kLamport),
               lines = world.link(rank, kLines);
    const float* const in = reinterpret_cast<const float*>(send);
    float* const out = reinterpret_cast<float*>(recv);
    const size_t count = call.bytes / 4;
    switch (call.op) {
        case kGatherPackets:
            return all_gather_packets<kWorld>(packets, send, recv, call.bytes);
        case kGatherLines:
            return all_gather_lines<kWorld>(lines, send, recv, call.bytes);
        case kBroadcast1:
            return broadcast_packets<kWorld, false>(packets, send, recv, call.bytes, call.root);
        case kBroadcast2:
            return broadcast_packets<kWorld, true>(packets, send, recv, call.bytes, call.root);
        case kBroadcastLines:
            return broadcast_lines<kWorld>(lines, send, recv, call.bytes, call.root);
        case kScatterPacks:
            return reduce_scatter<float, kWorld, Lamport>(lamport, in, out, count);
        case kScatterLines:
            return reduce_scatter_lines<float, kWorld>(lines, in, out, count);
        case kReduce1:
            return all_reduce_one_shot<float, kWorld, Packet>(packets, in, out, count);
        case kReduce1Lamport:
            return all_reduce_one_shot<float, kWorld, Lamport>(lamport, in, out, count);
        case kReduce2:
            return all_reduce_two_shot<float, kWorld, Lamport>(lamport, in, out, count);
        default:
            gpu::fail("no such operation");
    }
}

// A rank's operands of one call, with guards behind the result.
struct Operands {
    static constexpr size_t kGuard = 16;
    std::vector<char> send, recv, expected;
    char *from, *to;
};

void place(Operands& own, const Call& call, int world, int rank, const std::vector<std::vector<float>>& data) {
    const size_t sent = call.sent(world), received = call.received(world);
    own.send.assign(sent + 64, 0x55), own.recv.assign(received + 64, 0x66), own.expected.resize(received);
    own.from = aligned(own.send, 16) + call.shift, own.to = aligned(own.recv, 16) + call.shift;
    if (call.in_place && call.gathers()) own.from = own.to + rank * call.bytes;
    if (call.in_place && !call.gathers() && !call.scatters()) own.from = own.to;
    std::memcpy(own.from, data[rank].data(), sent);
    if (call.in_place && call.scatters()) own.to = own.from + rank * call.bytes;

    float* const out = reinterpret_cast<float*>(own.expected.data());
    const size_t count = call.bytes / 4, first = call.scatters() ? rank * count : 0;
    if (call.broadcasts()) std::memcpy(out, data[call.root].data(), call.bytes);
    if (call.gathers())
        for (int r = 0; r < world; r++) std::memcpy(out + r * count, data[r].data(), call.bytes);
    if (call.broadcasts() || call.gathers()) return;
    for (size_t i = 0; i < count; i++) {
        float sum = data[0][first + i];
        for (int r = 1; r < world; r++) sum += data[r][first + i];
        out[i] = sum;
    }
}

std::vector<std::vector<float>> any_data(const Call& call, int world, std::mt19937& random) {
    std::vector<std::vector<float>> data(world, std::vector<float>(call.sent(world) / 4));
    for (auto& of_rank : data)
        for (float& x : of_rank) x = float(int(random() % 2000) - 1000) / 7.0f;
    return data;
}

template <int kWorld>
void make(World& world, const std::vector<Call>& calls, std::mt19937& random, uint32_t seed) {
    std::vector<std::vector<Operands>> operands(calls.size(), std::vector<Operands>(kWorld));
    std::vector<std::vector<gpu::Launch>> launches(kWorld);
    for (size_t c = 0; c < calls.size(); c++) {
        const auto data = any_data(calls[c], kWorld, random);
        for (int rank = 0; rank < kWorld; rank++) {
            Operands& own = operands[c][rank];
            place(own, calls[c], kWorld, rank, data);
            launches[rank].push_back({calls[c].blocks, calls[c].threads, [&world, &own, rank, call = &calls[c]] {
                                          launch<kWorld>(world, rank, *call, own.from, own.to);
                                      }});
        }
    }
    gpu::run(launches, random);
    for (size_t c = 0; c < calls.size(); c++) {
        for (int rank = 0; rank < kWorld; rank++) {
            const Operands& own = operands[c][rank];
            const Call& call = calls[c];
            bool right = std::memcmp(own.to, own.expected.data(), own.expected.size()) == 0;
            if (!(call.in_place && call.scatters()))
                for (size_t i = 0; i < Operands::kGuard; i++) right &= own.to[own.expected.size() + i] == 0x66;
            if (right && world.ranks[rank].error.cause == 0) continue;
            std::printf(
                "FAILED: world %d, seed %u, call %zu (operation %d, %zu bytes from %d, %u x %u threads%s), rank %d\n",
                kWorld, seed, c, call.op, call.bytes, call.root, call.blocks, call.threads,
                call.in_place ? ", in place" : "", rank);
            std::exit(1);
        }
    }
}

// A rank alone makes a call of the operation: the others have left. `host` runs beside it.
template <int kWorld>
void make_alone(World& world, int rank, Op op, std::mt19937& random, std::vector<gpu::Launch> host) {
    Call call;
    do call = any_call(random, kWorld);
    while (call.op != op);
    Operands own;
    place(own, call, kWorld, rank, any_data(call, kWorld, random));
    std::vector<std::vector<gpu::Launch>> launches(kWorld);
    launches[rank].push_back(
        {call.blocks, call.threads, [&] { launch<kWorld>(world, rank, call, own.from, own.to); }});
    launches[(rank + 1) % kWorld] = std::move(host);
    gpu::run(launches, random);
    const Rank& alone = world.ranks[rank];
    if (alone.broken == kBroken && alone.error.cause == 0) return;
    std::printf("FAILED: world %d, operation %d: a hushed rank is left %u, with cause %u\n", kWorld, op, alone.broken,
                alone.error.cause);
    std::exit(1);
}

// A rank whose host has hushed it sends nothing in kernels that start later. The others' memory may be somebody else's.
template <int kWorld>
void hushed_before(World& world, std::mt19937& random) {
    for (int op = 0; op < kOps; op++) {
        const int rank = int(random() % kWorld);
        world.ranks[rank].broken = kHushed;
        const World before = world;
        make_alone<kWorld>(world, rank, Op(op), random, {});
        for (int r = 0; r < kWorld; r++)
            for (int kind = 0; kind < kKinds && r != rank; kind++)
                if (world.ranks[r].memory[kind] != before.ranks[r].memory[kind]) {
                    std::printf("FAILED: world %d, operation %d: a hushed rank has sent\n", kWorld, op);
                    std::exit(1);
                }
        world.ranks[rank].broken = kWhole;
    }
}

// Hushed while it waits for what it would add up and pass on, it gives up, and passes nothing on.
template <int kWorld>
void hushed_in_a_wait(World& world, std::mt19937& random) {
    const int rank = int(random() % kWorld);
    const World before = world;
    make_alone<kWorld>(world, rank, kReduce2, random, {{1, 1, [&world, rank] {
                                                            for (int turn = 0; turn < 50; turn++) gpu::yield();
                                                            world.ranks[rank].broken = kHushed;
                                                        }}});
    const size_t rows = size_t(kWorld) * kSlots * kPackBytes;
    for (int r = 0; r < kWorld; r++)
        for (uint32_t b = 0; b < kBuffers && r != rank; b++) {
            const size_t at = world.ranks[r].area(kLamport) - world.ranks[r].memory[kLamport].data() + kFlagBytes +
                              (b * kStages + kGather) * rows;
            const auto passed_on = [&](const World& w) { return w.ranks[r].memory[kLamport].data() + at; };
            if (std::memcmp(passed_on(world), passed_on(before), rows) == 0) continue;
            std::printf("FAILED: world %d: a rank that was hushed in a wait has passed on what it did not wait for\n",
                        kWorld);
            std::exit(1);
        }
}

template <int kWorld>
void sequence(uint32_t seed) {
    constexpr int kCalls = 8;
    std::mt19937 random(seed);
    // Numbers that wrap within the sequence, and others.
    World world(kWorld, seed % 2 ? 0xfffffff0u : random());
    if (seed % 4 == 2) {
        // Once round 2^32, with the flags lifted on the way, to the last rounds before the wrap.
        world.forget_flags();
        for (uint32_t round : {1u << 30, 2u << 30, 3u << 30, uint32_t(-500)}) {
            world.go_on_from(round);
            if (round != uint32_t(-500)) world.lift(random);
        }
    }
    std::vector<Call> calls;
    for (int c = 0; c < kCalls; c++) calls.push_back(any_call(random, kWorld));
    make<kWorld>(world, calls, random, seed);
    hushed_before<kWorld>(world, random);
    hushed_in_a_wait<kWorld>(world, random);
}

}  // namespace

int main(int count, char** words) {
    if (count != 3) gpu::fail("two seeds are needed");
    // A kernel that polls memory without letting anybody else run would never end.
    alarm(300);
    for (uint32_t seed = uint32_t(std::atoi(words[1])); seed < uint32_t(std::atoi(words[2])); seed++) {
#define SEQUENCE(WORLD) sequence<WORLD>(seed);
        WORLDS(SEQUENCE)
    }
    std::printf("every result was right\n");
}
