// SPDX-License-Identifier: Apache-2.0
// Python module: builds programs from decoded instructions and launches them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <unordered_map>

#include "machine.h"

namespace py = pybind11;

namespace emu {
namespace {

const std::unordered_map<std::string, Entry>& table(Arch arch) {
  static const auto build = [](Arch a) {
    Table t;
    add_scalar(t), add_vector(t), add_integer(t), add_compare(t), add_convert(t, a), add_lane(t), add_lds(t), add_global(t), add_matrix(t, a);
    std::unordered_map<std::string, Entry> map;
    for (auto& [name, e] : t.entries)
      if (!map.emplace(name, std::move(e)).second) throw Error("opcode " + name + " is defined twice");
    return map;
  };
  static const auto gfx942 = build(Arch::gfx942), gfx950 = build(Arch::gfx950);
  return arch == Arch::gfx942 ? gfx942 : gfx950;
}

Arch parse_arch(const std::string& name) {
  if (name == "gfx942") return Arch::gfx942;
  if (name == "gfx950") return Arch::gfx950;
  throw Error("emulated architecture: expected gfx942 or gfx950, got " + name);
}

u8 bits_of(const py::handle& list) {  // op_sel and friends: element i is bit i
  u8 b = 0;
  int i = 0;
  for (auto x : list) b |= u8(x.cast<int>() << i++);
  return b;
}

/// Sets one modifier; returns the Accept bit the handler must have.
u32 set_modifier(Program& p, Instruction& in, const std::string& key, const py::handle& value) {
  if (key == "offset") return in.offset = value.cast<i64>(), kOffset;
  if (key == "offset0") return in.offset0 = value.cast<u32>(), kTwoOffsets;
  if (key == "offset1") return in.offset1 = value.cast<u32>(), kTwoOffsets;
  if (key == "sc0") return in.sc0 = true, kCache;
  if (key == "sc1" || key == "nt") return kCache;
  if (key == "offen") return in.offen = true, kBuffer;
  if (key == "lds") return in.lds = true, kLdsDma;
  if (key == "clamp") return in.clamp = true, in.plain_result = false, kClamp;
  if (key == "omod") return in.omod = value.cast<f32>(), in.plain_result = false, kOmod;
  if (key == "op_sel") return in.op_sel = bits_of(value), kOpSel | kPacked | kMixed;
  if (key == "op_sel_hi") return in.op_sel_hi = bits_of(value), kPacked | kMixed;
  if (key == "neg_lo") return in.neg_lo = bits_of(value), kPacked | kMixed;
  if (key == "neg_hi") return in.neg_hi = bits_of(value), kPacked | kMixed;
  if (key == "cbsz") return in.cbsz = value.cast<u8>(), kMatrix;
  if (key == "blgp") return in.blgp = value.cast<u8>(), kMatrix;
  if (key == "dst_sel") return in.dst_sel = value.cast<u8>(), in.plain_result &= in.dst_sel == 6, kSdwa;
  if (key == "dst_unused") return in.dst_unused = value.cast<u8>(), kSdwa;
  if (key == "src0_sel") return in.op.at(in.first_source).select = value.cast<u8>(), kSdwa;
  if (key == "src1_sel") return in.op.at(in.first_source + 1).select = value.cast<u8>(), kSdwa;
  if (key == "bitop3") return in.offset0 = value.cast<u32>(), 0;
  if (key == "dpp") {
    const auto t = value.cast<py::tuple>();
    auto d = std::make_unique<Dpp>();
    const auto source = t[0].cast<std::vector<int>>();
    std::copy(source.begin(), source.end(), d->source);
    d->write = t[1].cast<u64>();
    d->bound_zero = t[2].cast<bool>();
    in.plain_result &= d->bound_zero && d->write == ~u64(0);
    in.dpp = d.get();
    p.dpps.push_back(std::move(d));
    return kDpp;
  }
  throw Error("unknown modifier " + key);
}

Operand parse_operand(Program& p, const py::tuple& t) {
  Operand o;
  o.kind = Kind(t[0].cast<int>());
  o.reg = t[1].cast<u16>();
  o.count = t[2].cast<u8>();
  const int signs = t[3].cast<int>();
  o.neg = signs & 1, o.abs = signs & 2, o.sext = signs & 4;
  if (o.kind == Kind::Literal) {
    const auto bits = t[4].cast<py::tuple>();
    o.bits64 = bits[0].cast<u64>(), o.bits32 = bits[1].cast<u32>(), o.bits16 = bits[2].cast<u16>(), o.real = bits[3].cast<bool>();
    auto row = std::make_unique<Row>();
    for (int l = 0; l < kLanes; ++l) (*row)[l] = o.bits32;
    o.broadcast = row.get();
    p.constants.push_back(std::move(row));
  }
  return o;
}

void check_operands(const Instruction& in, const Entry& e, u32 num_vgprs, u32 num_agprs) {
  const bool any_count = e.widths.empty() && e.first_source < 0;
  if (!any_count && in.op.size() != e.widths.size())
    throw Error("expected " + std::to_string(e.widths.size()) + " operands, got " + std::to_string(in.op.size()));
  for (size_t i = 0; i < in.op.size(); ++i) {
    const Operand& o = in.op[i];
    if (!any_count && e.widths[i] && (o.kind == Kind::Vector || o.kind == Kind::Scalar) && o.count != e.widths[i])
      throw Error("operand " + std::to_string(i) + ": expected " + std::to_string(e.widths[i]) + " registers, got " + std::to_string(o.count));
    if (o.kind == Kind::Vector && (o.reg < kFirstAgpr ? o.reg + o.count > int(num_vgprs) : o.reg - kFirstAgpr + o.count > int(num_agprs)))
      throw Error("operand " + std::to_string(i) + ": register beyond the kernel's allocation of " + std::to_string(num_vgprs) + " VGPRs and " + std::to_string(num_agprs) + " AGPRs");
    if (o.kind == Kind::Scalar && o.reg + o.count > 128 && e.cls != Class::Salu) throw Error("operand " + std::to_string(i) + ": special register not readable here");
    if ((o.neg || o.abs) && !(e.accepts & (kNegAbs | kPacked | kMixed))) throw Error("operand " + std::to_string(i) + ": sign modifier not known here");
    if (o.sext && !(e.accepts & kSdwa)) throw Error("operand " + std::to_string(i) + ": sext not known here");
  }
}

Instruction parse_instruction(Program& p, const py::tuple& t, const std::unordered_map<std::string, Entry>& map, u32 num_vgprs, u32 num_agprs) {
  Instruction in;
  in.mnemonic = t[0].cast<std::string>();
  in.text = t[1].cast<std::string>();
  in.index = u32(p.code.size());
  in.target = t[4].cast<int>();
  try {
    const auto found = map.find(in.mnemonic);
    if (found == map.end()) throw Error("unknown opcode " + in.mnemonic);
    const Entry& e = found->second;
    in.run = e.run, in.cls = e.cls, in.flops = e.flops, in.cycles = e.cycles;
    in.first_source = std::max(1, e.first_source);
    const bool packed = e.accepts & (kPacked | kMixed);
    if (e.accepts & kPacked) in.op_sel_hi = 0xff;  // what an omitted one means
    for (auto o : t[2].cast<py::list>()) in.op.push_back(parse_operand(p, o.cast<py::tuple>()));
    for (auto [key, value] : t[3].cast<py::dict>()) {
      const u32 need = set_modifier(p, in, key.cast<std::string>(), value);
      if (need && !(need & e.accepts)) throw Error("modifier " + key.cast<std::string>() + " is not known for " + in.mnemonic);
    }
    check_operands(in, e, num_vgprs, num_agprs);
    for (size_t i = 0; i < in.op.size(); ++i) {
      Operand& o = in.op[i];
      const bool high = !packed && i >= 1 && (in.op_sel >> (i - 1) & 1);
      o.special = o.neg || o.abs || o.sext || o.select != 6 || high || (in.dpp && int(i) == in.first_source);
    }
    in.atomic_return = (in.sc0 && in.mnemonic.find("_atomic_") != std::string::npos);
    p.ordered |= in.mnemonic.find("_atomic_") != std::string::npos && (in.sc0 || in.mnemonic.find("_f") != std::string::npos);
  } catch (const Error& e) {
    throw Error(p.name + ": " + e.what() + "\n  at instruction " + std::to_string(in.index) + ": " + in.text);
  }
  return in;
}

std::unique_ptr<Program> make_program(const std::string& arch, const std::string& name, const py::list& instructions, u32 num_vgprs, u32 num_agprs) {
  auto p = std::make_unique<Program>();
  p->arch = parse_arch(arch);
  p->name = name;
  for (auto t : instructions) p->code.push_back(parse_instruction(*p, t.cast<py::tuple>(), table(p->arch), num_vgprs, num_agprs));
  return p;
}

template <class T> T get(const py::dict& d, const char* key) { return d[key].cast<T>(); }

/// One tensor: (address, bytes, name, writable, address of a byte per byte written or 0).
std::vector<Region> make_regions(const py::list& tensors, bool lines) {
  std::vector<Region> regions;
  for (auto item : tensors) {
    const auto t = item.cast<py::tuple>();
    Region r;
    r.base = t[0].cast<u64>(), r.size = t[1].cast<u64>(), r.name = t[2].cast<std::string>(), r.writable = t[3].cast<bool>();
    r.written = reinterpret_cast<u8*>(t[4].cast<u64>());
    if (lines) r.lines = std::make_unique<std::atomic<u8>[]>(r.size / 128 + 2);
    regions.push_back(std::move(r));
  }
  return regions;
}

py::dict summarize(const Launch& launch, const Counters& c) {
  static const char* const names[] = {"valu", "mfma", "salu", "smem", "vmem", "lds", "control"};
  u64 by_class[int(Class::Count)] = {}, flops = 0, cycles = 0, barriers = 0, total = 0;
  for (const Instruction& in : launch.program->code) {
    const u64 n = c.executed[in.index];
    by_class[int(in.cls)] += n, total += n;
    flops += n * in.flops, cycles += n * in.cycles;
    if (in.mnemonic == "s_barrier") barriers += n;
  }
  u64 read_lines = 0, written_lines = 0, lines = 0;
  for (const Region& r : launch.regions) {
    if (!r.lines) continue;
    for (u64 i = 0; i < r.size / 128 + 2; ++i) {
      const u8 x = r.lines[i].load(std::memory_order_relaxed);
      read_lines += x & 1, written_lines += x >> 1 & 1, lines += x != 0;
    }
  }
  py::dict d;
  for (int i = 0; i < int(Class::Count); ++i) d[names[i]] = by_class[i];
  d["instructions"] = total, d["mfma_flops"] = flops, d["mfma_cycles"] = cycles, d["barriers"] = barriers;
  d["bytes_read"] = c.bytes_read, d["bytes_written"] = c.bytes_written, d["wide_bytes"] = c.wide_bytes;
  d["lines_read"] = read_lines, d["lines_written"] = written_lines, d["lines"] = lines;
  d["lds_bytes"] = c.lds_bytes, d["lds_conflicts"] = c.lds_conflicts;
  return d;
}

py::dict launch(const Program& program, const py::dict& o) {
  Launch l;
  l.program = &program;
  l.checks.races = get<bool>(o, "races"), l.checks.count_lines = get<bool>(o, "count_lines"), l.checks.bank_conflicts = get<bool>(o, "bank_conflicts");
  l.regions = make_regions(get<py::list>(o, "tensors"), l.checks.count_lines);
  const auto grid = get<std::vector<u32>>(o, "grid"), block = get<std::vector<u32>>(o, "block");
  std::copy_n(grid.begin(), 3, l.grid), std::copy_n(block.begin(), 3, l.block);
  l.lds_size = get<u32>(o, "lds_size"), l.scratch_size = get<u32>(o, "scratch_size");
  l.num_vgprs = get<u32>(o, "num_vgprs"), l.accum_offset = get<u32>(o, "accum_offset"), l.mode = get<u32>(o, "mode");
  l.user_sgprs = get<std::vector<u32>>(o, "user_sgprs");
  const auto ids = get<std::vector<int>>(o, "group_id_sgprs");
  std::copy_n(ids.begin(), 3, l.group_id_sgpr);
  l.poison = get<u32>(o, "poison"), l.step_limit = get<u64>(o, "step_limit");
  const auto trace_at = get<std::vector<int>>(o, "trace");
  std::vector<std::string> trace;
  if (!trace_at.empty()) l.trace = &trace, l.trace_group = trace_at[0], l.trace_wave = trace_at[1], l.break_at = trace_at[2];
  const int threads = program.ordered ? 1 : get<int>(o, "threads");
  Counters total;
  {
    py::gil_scoped_release release;
    run_launch(l, threads, total);
  }
  py::dict d = summarize(l, total);
  d["trace"] = trace;
  d["executed"] = total.executed;
  return d;
}

}  // namespace
}  // namespace emu

PYBIND11_MODULE(_emulator, m) {
  m.doc() = "Interpreter of gfx942 and gfx950 machine code.";
  py::register_exception<emu::Error>(m, "EmulationError", PyExc_RuntimeError);
  py::class_<emu::Program>(m, "Program").def_property_readonly("length", [](const emu::Program& p) { return p.code.size(); });
  m.def("make_program", &emu::make_program, "Checks and binds decoded instructions.");
  m.def("launch", &emu::launch, "Runs a program over a grid and returns its counters.");
  m.def("opcodes", [](const std::string& arch) {
    std::vector<std::string> names;
    for (const auto& [name, e] : emu::table(emu::parse_arch(arch))) names.push_back(name);
    std::sort(names.begin(), names.end());
    return names;
  }, "Names of all opcodes known for an architecture.");
}
