// Programs: a row of ops that a tape (vitkernels/tape.py) has written down, run in one call. Between one op of a stretch
// and the next stand else Python, the dispatcher and the stable ABI's boxes, which on few tokens take as long as kernels.
#pragma once
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

namespace vk {

// A program as a tensor, which owns it. Slots hold tensors while it runs: slot 0 none, the next ones the inputs.
//   code: how many inputs and slots; how many results, and their slots; then the lines: an op's number (its place in
//     `names`), a kind and a value for each of its arguments, a slot for each result (0: nobody reads it), and how many
//     slots nobody reads after it, and which.
//   numbers, names: what values of these kinds point to.
torch::stable::Tensor make_program(const std::vector<int64_t>& code, const std::vector<double>& numbers,
                                   const std::vector<std::string>& names);

// (Tensor program, Tensor[] inputs) -> Tensor[], past the boxes that would be made for it.
void run_program(StableIValue* stack, uint64_t arguments, uint64_t results);

}  // namespace vk
