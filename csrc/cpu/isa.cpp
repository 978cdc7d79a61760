// Chooses the instruction set once, at load; tests choose another.
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vk {

#define VK_DECLARE(isa)                    \
  namespace isa {                          \
  const Kernels<float>& kernels_float();   \
  const Kernels<double>& kernels_double(); \
  }
VK_DECLARE(baseline)
#if defined(__x86_64__)
VK_DECLARE(avx2)
VK_DECLARE(avx512)
VK_DECLARE(avx512_bf16)
VK_DECLARE(amx)
#endif

namespace {

#if defined(__x86_64__)
// Whether there is a matrix unit for bfloat16, and the system lends its registers to a process that asks.
bool has_tiles() {
#if defined(__linux__)
  constexpr unsigned wanted = 1u << 22 | 1u << 24;     // AMX-BF16, AMX-TILE
  constexpr long ask_for_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & wanted) == wanted &&
         syscall(SYS_arch_prctl, ask_for_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

int64_t find_highest_isa() {
#if defined(__x86_64__)
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4 && __builtin_cpu_supports("avx512bf16")) return has_tiles() ? 4 : 3;
  return v4 ? 2 : v3 ? 1 : 0;
#else
  return 0;
#endif
}

int64_t highest_isa() {
  static const int64_t found = find_highest_isa();
  return found;
}

int64_t& isa() {
  static int64_t now = highest_isa();
  return now;
}

}  // namespace

int64_t set_isa(int64_t wanted) {
  if (wanted >= 0) isa() = wanted < highest_isa() ? wanted : highest_isa();
  return isa();
}

template <>
const Kernels<float>& kernels<float>() {
#if defined(__x86_64__)
  if (isa() == 4) return amx::kernels_float();
  if (isa() == 3) return avx512_bf16::kernels_float();
  if (isa() == 2) return avx512::kernels_float();
  if (isa() == 1) return avx2::kernels_float();
#endif
  return baseline::kernels_float();
}

template <>
const Kernels<double>& kernels<double>() {
#if defined(__x86_64__)
  if (isa() == 4) return amx::kernels_double();
  if (isa() == 3) return avx512_bf16::kernels_double();
  if (isa() == 2) return avx512::kernels_double();
  if (isa() == 1) return avx2::kernels_double();
#endif
  return baseline::kernels_double();
}

}  // namespace vk
