#include "cuda/launch.h"

#include <sstream>

namespace vk {
namespace {

constexpr size_t kSharedAlways = 48 << 10;  // bytes of dynamic shared memory that need not be asked for
constexpr int64_t kMostAlongX = 2147483647, kMostAlongYZ = 65535;

template <class Sizes>
std::string text(const Sizes& d) {
  std::ostringstream out;
  out << d.x << " x " << d.y << " x " << d.z;
  return out.str();
}

}  // namespace

Launches::Launches(const char* op, const Tensor& like, std::initializer_list<const Tensor*> tensors)
    : op_(op), tensors_{&like}, device_(like.get_device_index()) {
  tensors_.insert(tensors_.end(), tensors.begin(), tensors.end());
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device_, &guard_));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
}

Launches::~Launches() { aoti_torch_delete_cuda_guard(guard_); }

void Launches::launch(const char* name, const void* kernel, Grid grid, dim3 block, size_t shared, void** args) const {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const bool fits = grid.x <= kMostAlongX && grid.y <= kMostAlongYZ && grid.z <= kMostAlongYZ;
  check(fits ? cudaSuccess : cudaErrorInvalidConfiguration, name, grid, block, shared);
  if (shared > kSharedAlways) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), name, grid, block,
          shared);
  }
  check(cudaLaunchKernel(kernel, dim3(grid.x, grid.y, grid.z), block, args, shared, static_cast<cudaStream_t>(stream_)),
        name, grid, block, shared);
}

void Launches::check(cudaError_t error, const char* what, Grid grid, dim3 block, size_t shared) const {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here, and not once more by who launches next
  std::ostringstream shapes;
  for (const Tensor* t : tensors_) {
    if (!t) continue;
    shapes << (shapes.tellp() > 0 ? ", [" : "[");
    for (int64_t i = 0; i < t->dim(); ++i) shapes << (i ? ", " : "") << t->size(i);
    shapes << "]";
  }
  STD_TORCH_CHECK(false, op_, ": kernel ", what, " did not launch: ", cudaGetErrorString(error), " (grid ", text(grid),
                  ", block ", text(block), ", ", shared, " bytes of shared memory; tensors ", shapes.str(), ")");
}

int64_t Launches::at_once(const void* kernel, unsigned threads) const {
  int processors = 1, of_each = 1;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device_), "(multiprocessors)", {0}, 0, 0);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, int(threads), 0), "(blocks at once)", {0},
        threads, 0);
  return int64_t(processors) * std::max(of_each, 1);
}

}  // namespace vk
