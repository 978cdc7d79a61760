#include "program.h"

#include <deque>
#include <functional>
#include <memory>

#include "shared/register.h"

namespace vk {
namespace {

enum class Kind : int64_t { none, tensor, whole, number, name, flags, dtype };

// By `Kind`; a tensor by its slot, a dtype by its number and 1, so that nothing is 0.
union Argument {
  int64_t whole;
  double number;
  const std::string* name;
  const std::vector<bool>* flags;
};

// How a parameter of type T is had: whether it may be of a kind, and what it is.
template <class T>
struct As;
template <>
struct As<Tensor> {
  static bool takes(Kind kind) { return kind == Kind::tensor; }
  static const Tensor& of(const Argument& a, const Maybe* slots) { return *slots[a.whole]; }
};
template <>
struct As<Maybe> {
  static bool takes(Kind kind) { return kind == Kind::tensor || kind == Kind::none; }
  static const Maybe& of(const Argument& a, const Maybe* slots) { return slots[a.whole]; }
};
template <>
struct As<int64_t> {
  static bool takes(Kind kind) { return kind == Kind::whole; }
  static int64_t of(const Argument& a, const Maybe*) { return a.whole; }
};
template <>
struct As<bool> {
  static bool takes(Kind kind) { return kind == Kind::whole; }
  static bool of(const Argument& a, const Maybe*) { return a.whole != 0; }
};
template <>
struct As<double> {
  static bool takes(Kind kind) { return kind == Kind::number || kind == Kind::whole; }
  static double of(const Argument& a, const Maybe*) { return a.number; }
};
template <>
struct As<std::string> {
  static bool takes(Kind kind) { return kind == Kind::name; }
  static const std::string& of(const Argument& a, const Maybe*) { return *a.name; }
};
template <>
struct As<std::vector<bool>> {
  static bool takes(Kind kind) { return kind == Kind::flags; }
  static const std::vector<bool>& of(const Argument& a, const Maybe*) { return *a.flags; }
};
template <>
struct As<std::optional<ScalarType>> {
  static bool takes(Kind kind) { return kind == Kind::dtype || kind == Kind::none; }
  static std::optional<ScalarType> of(const Argument& a, const Maybe*) {
    return a.whole == 0 ? std::nullopt : std::make_optional(ScalarType(a.whole - 1));
  }
};

// A function of the extension on slots.
struct Op {
  using Takes = bool (*)(Kind);
  const char* name;
  void (*call)(const Argument* arguments, Maybe* slots, const int64_t* results);
  std::vector<Takes> arguments;
  size_t results;
};

void put(Maybe* slots, const int64_t* results, Tensor&& found) {
  if (results[0] > 0) slots[results[0]] = std::move(found);
}

template <class... R, size_t... I>
void put_each(Maybe* slots, const int64_t* results, std::tuple<R...>&& found, std::index_sequence<I...>) {
  (put(slots, results + I, std::move(std::get<I>(found))), ...);
}

template <class... R>
void put(Maybe* slots, const int64_t* results, std::tuple<R...>&& found) {
  put_each(slots, results, std::move(found), std::index_sequence_for<R...>());
}

template <auto f, class R, class... A, size_t... I>
Op op_of(const char* name, R (*)(A...), std::index_sequence<I...>) {
  return {name,
          [](const Argument* arguments, Maybe* slots, const int64_t* results) {
            put(slots, results, f(As<std::decay_t<A>>::of(arguments[I], slots)...));
          },
          {&As<std::decay_t<A>>::takes...},
          count_of<R>};
}

template <auto f, class R, class... A>
Op op_of(const char* name, R (*function)(A...)) {
  return op_of<f>(name, function, std::index_sequence_for<A...>());
}

Op op_named(const std::string& name) {
  std::optional<Op> found;
  each_op([&](const char* each, auto function) {
    if (name == each) found = op_of<decltype(function)::call>(each, decltype(function)::call);
  });
  STD_TORCH_CHECK(found, "vitkernels: a program knows no op '", name, "'");
  return *found;
}

struct Line {
  decltype(Op::call) call;
  size_t arguments, results;  // where its own begin
  size_t dropped, end;        // which of the slots that are dropped are its own
};

struct Program {
  const void* mark;  // of programs: its own address
  size_t inputs, slots;
  std::vector<int64_t> outputs;
  std::vector<Line> lines;
  // of all lines
  std::vector<Argument> arguments;
  std::vector<int64_t> results, dropped;
  std::vector<double> numbers;
  std::vector<std::string> names;
  std::deque<std::vector<bool>> flags;
};

const char mark = 0;

class Reader {
 public:
  explicit Reader(const std::vector<int64_t>& code) : code_(code) {}
  bool ended() const { return at_ == code_.size(); }
  int64_t next() {
    STD_TORCH_CHECK(!ended(), "vitkernels: a program's code ends within a line");
    return code_[at_++];
  }
  size_t below(size_t end) {
    const int64_t found = next();
    STD_TORCH_CHECK(found >= 0 && size_t(found) < end, "vitkernels: a program's code has ", found, " for one of ", end);
    return size_t(found);
  }

 private:
  const std::vector<int64_t>& code_;
  size_t at_ = 0;
};

constexpr size_t kMost = 1 << 16;  // slots

Argument read_argument(Reader& reader, Op::Takes takes, const std::vector<bool>& held, Program& program) {
  const Kind kind = Kind(reader.next());
  STD_TORCH_CHECK(takes(kind), "vitkernels: a program's op does not take an argument of kind ", int64_t(kind));
  Argument argument{};
  switch (kind) {
    case Kind::none:
      reader.next();
      break;
    case Kind::tensor:
      argument.whole = int64_t(reader.below(program.slots));
      STD_TORCH_CHECK(held[size_t(argument.whole)], "vitkernels: a program reads an empty slot, ", argument.whole);
      break;
    case Kind::dtype:
      argument.whole = reader.next() + 1;
      break;
    case Kind::number:
      argument.number = program.numbers[reader.below(program.numbers.size())];
      break;
    case Kind::name:
      argument.name = &program.names[reader.below(program.names.size())];
      break;
    case Kind::flags: {  // bits, above them a 1
      std::vector<bool> flags;
      for (int64_t bits = reader.next(); bits > 1; bits >>= 1) flags.push_back(bits & 1);
      argument.flags = &program.flags.emplace_back(std::move(flags));
      break;
    }
    default:
      argument.whole = reader.next();
      // an eps of 1, say: what takes a number takes a whole one, as torch's dispatcher has it
      if (takes(Kind::number)) argument.number = double(argument.whole);
  }
  return argument;
}

void read_line(Reader& reader, std::vector<bool>& held, Program& program) {
  const Op op = op_named(program.names[reader.below(program.names.size())]);
  Line line{op.call, program.arguments.size(), program.results.size(), program.dropped.size(), 0};
  for (const Op::Takes takes : op.arguments) program.arguments.push_back(read_argument(reader, takes, held, program));
  for (size_t i = 0; i < op.results; ++i) {
    const size_t slot = reader.below(program.slots);
    program.results.push_back(int64_t(slot));
    held[slot] = slot > 0;
  }
  for (size_t count = reader.below(program.slots); count > 0; --count) {
    const size_t slot = reader.below(program.slots);
    program.dropped.push_back(int64_t(slot));
    held[slot] = false;
  }
  line.end = program.dropped.size();
  program.lines.push_back(line);
}

// A list of tensors that is deleted with it.
struct List {
  StableListHandle handle = nullptr;
  ~List() {
    if (handle) torch_delete_list(handle);
  }
};

}  // namespace

Tensor make_program(const std::vector<int64_t>& code, const std::vector<double>& numbers,
                    const std::vector<std::string>& names) {
  auto program = std::make_unique<Program>();
  program->mark = &mark;
  program->numbers = numbers;
  program->names = names;
  Reader reader(code);
  program->inputs = reader.below(kMost);
  program->slots = reader.below(kMost);
  STD_TORCH_CHECK(program->inputs < program->slots, "vitkernels: a program has no slots for its inputs");
  const size_t outputs = reader.below(program->slots);
  for (size_t i = 0; i < outputs; ++i) program->outputs.push_back(int64_t(reader.below(program->slots)));
  std::vector<bool> held(program->slots, false);
  std::fill(held.begin() + 1, held.begin() + 1 + int64_t(program->inputs), true);
  while (!reader.ended()) read_line(reader, held, *program);
  for (const int64_t slot : program->outputs) {
    STD_TORCH_CHECK(held[size_t(slot)], "vitkernels: a program's result ", slot, " is empty");
  }
  const int64_t size = sizeof(Program), step = 1;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const auto free = [](void* data) { delete static_cast<Program*>(data); };
  Tensor owner = torch::stable::from_blob(program.get(), {&size, 1}, {&step, 1}, cpu, ScalarType::Byte, +free);
  program.release();
  return owner;
}

void run_program(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor owner = torch::stable::detail::to<Tensor>(stack[0]);
  const List inputs{torch::stable::detail::to<StableListHandle>(stack[1])};
  STD_TORCH_CHECK(owner.numel() == sizeof(Program), "vitkernels: run needs a program");
  const Program& program = *static_cast<const Program*>(owner.data_ptr());
  STD_TORCH_CHECK(program.mark == &mark, "vitkernels: run needs a program");
  size_t count = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(inputs.handle, &count));
  STD_TORCH_CHECK(count == program.inputs, "vitkernels: a program of ", program.inputs, " inputs got ", count);
  std::vector<Maybe> slots(program.slots);
  for (size_t i = 0; i < count; ++i) {
    StableIValue item;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(inputs.handle, i, &item));
    slots[i + 1].emplace(torch::stable::detail::to<AtenTensorHandle>(item));
  }
  for (const Line& line : program.lines) {
    line.call(program.arguments.data() + line.arguments, slots.data(), program.results.data() + line.results);
    for (size_t i = line.dropped; i < line.end; ++i) slots[size_t(program.dropped[i])].reset();
  }
  List found;
  TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(program.outputs.size(), &found.handle));
  for (const int64_t slot : program.outputs) {
    TORCH_ERROR_CODE_CHECK(torch_list_push_back(found.handle, torch::stable::detail::from(*slots[size_t(slot)])));
  }
  stack[0] = torch::stable::detail::from(found.handle);
  found.handle = nullptr;
}

}  // namespace vk
