// How torch calls a function: arguments and results on a stack of the stable ABI. As TORCH_BOX, which does the same, but for
// strings: torch 2.13 copies one into memory that nobody gives back, at each call.
#pragma once
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace vk {

// Takes a value off the stack.
template <class T>
struct Unboxed {
  static T of(StableIValue value) { return torch::stable::detail::to<T>(value); }
};

template <>
struct Unboxed<std::string> {
  static std::string of(StableIValue value) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    std::string text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

template <>
struct Unboxed<std::vector<std::string>> {
  static std::vector<std::string> of(StableIValue value) {
    const auto handle = torch::stable::detail::to<StableListHandle>(value);
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(handle, &size));
    std::vector<std::string> found;
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(handle, i, &item));
      found.push_back(Unboxed<std::string>::of(item));
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(handle));
    return found;
  }
};

template <class R>
void box_result(StableIValue* stack, R&& result) {
  stack[0] = torch::stable::detail::from(result);
}
template <class... R>
void box_result(StableIValue* stack, std::tuple<R...>&& results) {
  torch::stable::detail::box_from_tuple<R...>(stack, std::move(results));
}

template <class R>
constexpr uint64_t count_of = 1;
template <class... R>
constexpr uint64_t count_of<std::tuple<R...>> = sizeof...(R);

template <auto f, class R, class... A, size_t... I>
void call_boxed(R (*)(A...), StableIValue* stack, uint64_t arguments, uint64_t results, std::index_sequence<I...>) {
  STD_TORCH_CHECK(arguments == sizeof...(A) && results == count_of<R>, "vitkernels: a schema of ", arguments,
                  " arguments and ", results, " results for a function of ", sizeof...(A), " and ", count_of<R>);
  std::tuple<std::decay_t<A>...> own{Unboxed<std::decay_t<A>>::of(stack[I])...};
  box_result(stack, f(std::get<I>(own)...));
}

template <auto f, class R, class... A>
void call_boxed(R (*function)(A...), StableIValue* stack, uint64_t arguments, uint64_t results) {
  call_boxed<f>(function, stack, arguments, results, std::index_sequence_for<A...>());
}

template <auto f>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t results) {
  call_boxed<f>(f, stack, arguments, results);
}

}  // namespace vk
