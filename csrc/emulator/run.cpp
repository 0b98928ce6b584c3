// SPDX-License-Identifier: Apache-2.0
// Launch: workgroups over threads, waves between barriers, errors, traces.
#include <algorithm>
#include <mutex>
#include <sstream>
#include <thread>

#include "machine.h"

namespace emu {
namespace {

std::string hex(u64 x) {
  std::ostringstream s;
  s << "0x" << std::hex << x;
  return s.str();
}

/// One line of trace: the instruction and the result in the first lanes.
void trace_step(Launch& launch, const Wave& w, const Instruction& in) {
  std::ostringstream s;
  s << in.index << ": " << in.text;
  if (!in.op.empty() && in.op[0].kind == Kind::Vector) {
    s << "  ; " << (in.op[0].reg < kFirstAgpr ? "v" : "a") << in.op[0].reg % kFirstAgpr << " =";
    for (int l = 0; l < 4; ++l) s << ' ' << hex(w.v[in.op[0].reg][l]);
  } else if (!in.op.empty() && in.op[0].kind == Kind::Scalar && in.op[0].reg < 128) {
    s << "  ; s" << in.op[0].reg << " = " << hex(w.s[in.op[0].reg]) << " scc=" << w.scc;
  }
  s << "  exec=" << hex(w.exec());
  launch.trace->push_back(s.str());
}

void dump_registers(Launch& launch, const Wave& w, const Instruction& in) {
  std::ostringstream s;
  s << "registers before " << in.index << ": " << in.text << "\nexec=" << hex(w.exec()) << " scc=" << w.scc << " m0=" << hex(w.s[kM0]) << '\n';
  for (int i = 0; i < 108; ++i) s << 's' << i << '=' << hex(w.s[i]) << (i % 8 == 7 ? '\n' : ' ');
  s << '\n';
  for (u32 r = 0; r < launch.num_vgprs && r < 512; ++r) {
    const bool agpr = r >= launch.accum_offset;
    s << (agpr ? 'a' : 'v') << (agpr ? r - launch.accum_offset : r) << ':';
    for (int l = 0; l < kLanes; ++l) s << ' ' << hex(w.v[agpr ? kFirstAgpr + r - launch.accum_offset : r][l]);
    s << '\n';
  }
  launch.trace->push_back(s.str());
}

void run_traced(Launch& launch, Wave& w) {
  const auto& code = launch.program->code;
  while (w.running) {
    const Instruction& in = code[w.pc++];
    ++w.group->counters->executed[in.index];
    if (int(in.index) == launch.break_at) dump_registers(launch, w, in);
    in.run(w, in);
    if (launch.break_at < 0) trace_step(launch, w, in);
  }
}

/// Runs a wave to its next barrier, its end, or the end of its slice.
void run_wave(Launch& launch, Wave& w, u64 slice) {
  const Instruction* code = launch.program->code.data();
  u64* executed = w.group->counters->executed.data();
  w.running = true;
  const u32* id = w.group->index;
  if (launch.trace && w.id == launch.trace_wave && int(id[0] + launch.grid[0] * (id[1] + launch.grid[1] * id[2])) == launch.trace_group)
    return run_traced(launch, w);
  u64 left = slice;
  while (w.running && left) {
    const Instruction& in = code[w.pc++];
    ++executed[in.index];
    --left;
    in.run(w, in);
  }
  w.steps += slice - left;
  if (w.steps > launch.step_limit) fail(w, code[w.pc - 1], "step limit reached: the wave does not end (endless loop, or waiting for another workgroup?)");
}

void start_wave(Launch& launch, Group& group, Wave& w, int id) {
  w.id = id;
  w.group = &group;
  w.pc = 0;
  w.done = w.at_barrier = w.scc = false;
  w.steps = 0;
  w.mode = launch.mode;
  w.s.fill(launch.poison);
  for (u32 r = 0; r < launch.num_vgprs; ++r) {
    const u32 at = r < launch.accum_offset ? r : kFirstAgpr + r - launch.accum_offset;
    for (int l = 0; l < kLanes; ++l) w.v[at][l] = launch.poison;
  }
  w.scratch_size = launch.scratch_size;
  w.scratch.resize(u64(launch.scratch_size) * kLanes);
  for (size_t i = 0; i + 4 <= w.scratch.size(); i += 4) std::memcpy(&w.scratch[i], &launch.poison, 4);
  std::copy(launch.user_sgprs.begin(), launch.user_sgprs.end(), w.s.begin());
  for (int d = 0; d < 3; ++d)
    if (launch.group_id_sgpr[d] >= 0) w.s[launch.group_id_sgpr[d]] = group.index[d];
  const u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
  u64 exec = 0;
  for (int l = 0; l < kLanes; ++l) {
    const u32 t = u32(id * kLanes + l);
    if (t >= threads) continue;
    exec |= u64(1) << l;
    const u32 x = t % launch.block[0], y = t / launch.block[0] % launch.block[1], z = t / launch.block[0] / launch.block[1];
    w.v[0][l] = x | y << 10 | z << 20;
  }
  w.write_scalar64(kExec, exec);
}

std::unique_ptr<Group> start_group(Launch& launch, u64 flat, Counters* counters, std::vector<Region*>* hints, std::unique_ptr<Group> g) {
  if (!g) g = std::make_unique<Group>();
  g->launch = &launch;
  g->counters = counters;
  g->hints = hints;
  g->index[0] = u32(flat % launch.grid[0]);
  g->index[1] = u32(flat / launch.grid[0] % launch.grid[1]);
  g->index[2] = u32(flat / launch.grid[0] / launch.grid[1]);
  g->lds.resize(launch.lds_size);
  for (size_t i = 0; i + 4 <= g->lds.size(); i += 4) std::memcpy(&g->lds[i], &launch.poison, 4);
  if (launch.checks.races) g->shadow.assign((launch.lds_size + 3) / 4, {});
  g->epoch = 1;
  const u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
  g->waves.resize((threads + kLanes - 1) / kLanes);
  for (size_t i = 0; i < g->waves.size(); ++i) {
    if (!g->waves[i]) g->waves[i] = std::make_unique<Wave>();
    start_wave(launch, *g, *g->waves[i], int(i));
  }
  return g;
}

/// One round: every wave that can go on does. Returns whether the group has finished; a released barrier resets rounds.
bool step_group(Launch& launch, Group& g, u64 slice, u64& rounds) {
  bool all_done = true, all_wait = true;
  for (auto& w : g.waves) {
    if (!w->done && !w->at_barrier) run_wave(launch, *w, slice);
    all_done &= w->done;
    all_wait &= w->done || w->at_barrier;
  }
  if (!all_done && all_wait) {
    for (auto& w : g.waves) w->at_barrier = false;
    ++g.epoch;
    rounds = 0;
  }
  return all_done;
}

}  // namespace

void fail(const Wave& w, const Instruction& in, const std::string& what) {
  const Group& g = *w.group;
  std::ostringstream s;
  s << g.launch->program->name << ": " << what << "\n  at instruction " << in.index << ": " << in.text << "\n  workgroup (" << g.index[0] << ", "
    << g.index[1] << ", " << g.index[2] << "), wave " << w.id;
  throw Error(s.str());
}

Region& check_access(Wave& w, const Instruction& in, u64 address, u32 size, bool write, int lane) {
  auto& regions = w.group->launch->regions;
  auto after = std::upper_bound(regions.begin(), regions.end(), address, [](u64 a, const Region& r) { return a < r.base; });
  Region* r = after == regions.begin() ? nullptr : &*(after - 1);
  const bool inside = r && address - r->base < r->size && r->size - (address - r->base) >= size;
  if (!inside) {
    std::ostringstream s;
    s << "out of bounds: lane " << lane << (write ? " writes " : " reads ") << size << " bytes at " << hex(address);
    const Region* next = after == regions.end() ? nullptr : &*after;
    const u64 past = r ? address - r->base : ~u64(0), before = next ? next->base - address : ~u64(0);
    if (r && past - r->size <= before) s << ", " << i64(past - r->size) << " bytes past the end of " << r->name << " (" << r->size << " bytes)";
    else if (next) s << ", " << before << " bytes before " << next->name << " (" << next->size << " bytes)";
    else s << "; no tensor was passed to the kernel";
    fail(w, in, s.str());
  }
  if (write && !r->writable) fail(w, in, "lane " + std::to_string(lane) + " writes read-only " + r->name + " at offset " + std::to_string(address - r->base));
  if (w.group->launch->checks.count_lines)
    for (u64 line = (address - r->base) >> 7; line <= (address - r->base + size - 1) >> 7; ++line)
      r->lines[line].fetch_or(write ? 2 : 1, std::memory_order_relaxed);
  if (write && r->written) std::memset(r->written + (address - r->base), 1, size);
  return *r;
}

void run_launch(Launch& launch, int num_threads, Counters& total) {
  const u64 groups = u64(launch.grid[0]) * launch.grid[1] * launch.grid[2];
  const size_t length = launch.program->code.size();
  std::atomic<u64> next{0};
  std::atomic<bool> stop{false};
  std::mutex lock;
  std::string error;
  total.executed.assign(length, 0);
  const auto work = [&] {
    Counters mine;
    mine.executed.assign(length, 0);
    std::vector<Region*> hints(length, nullptr);
    std::vector<std::unique_ptr<Group>> resident, spare;
    try {
      const u64 slice = 20000;
      u64 rounds = 0;
      while (!stop) {
        // Normally one workgroup at a time; more when the oldest spins, for it may wait for another one.
        if (resident.empty() || (rounds > 200 && int(resident.size()) < launch.resident)) {
          const u64 flat = next++;
          if (flat < groups) {
            std::unique_ptr<Group> reuse;
            if (!spare.empty()) reuse = std::move(spare.back()), spare.pop_back();
            resident.push_back(start_group(launch, flat, &mine, &hints, std::move(reuse)));
            rounds = 0;
          } else if (resident.empty()) {
            break;
          }
        }
        ++rounds;
        for (size_t i = 0; i < resident.size();) {
          if (step_group(launch, *resident[i], slice, rounds)) {
            spare.push_back(std::move(resident[i]));
            resident.erase(resident.begin() + i64(i));
          } else {
            ++i;
          }
        }
      }
    } catch (const std::exception& e) {
      std::lock_guard<std::mutex> hold(lock);
      if (error.empty()) error = e.what();
      stop = true;
    }
    std::lock_guard<std::mutex> hold(lock);
    for (size_t i = 0; i < length; ++i) total.executed[i] += mine.executed[i];
    total.bytes_read += mine.bytes_read, total.bytes_written += mine.bytes_written, total.wide_bytes += mine.wide_bytes;
    total.lds_bytes += mine.lds_bytes, total.lds_conflicts += mine.lds_conflicts;
  };
  const int threads = int(std::min<u64>(u64(std::max(1, num_threads)), groups));
  if (threads <= 1) {
    work();
  } else {
    std::vector<std::thread> pool;
    for (int i = 0; i < threads; ++i) pool.emplace_back(work);
    for (auto& t : pool) t.join();
  }
  if (!error.empty()) throw Error(error);
}

}  // namespace emu
