// Stands in for CUDA's runtime where there is no GPU: what a module compiled by nvcc registers and launches is handed
// over to who holds the other end (ptx/cuda.py). Declared by hand: this is all of it that such a module calls.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

struct Size {
  unsigned x, y, z;
};
struct FatBinary {  // as nvcc's fatbinary_section.h has it
  int magic, version;
  const unsigned char* data;
  void* more;
};
struct Kernel {
  std::string name;
  const unsigned char* code;
};
// name, code with its size in its header, grid, block, bytes of shared memory, addresses of the arguments; an error or 0
using Launch = int (*)(const char*, const unsigned char*, const unsigned*, const unsigned*, size_t, void**);

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}
Launch launch = nullptr;
int processors = 1;
int last_error = 0;
int guards = 0;  // of the device, open now
int stream;      // whose address is torch's current stream
constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76;  // of cudaDeviceAttr
int capability[2] = {9, 0};

}  // namespace

extern "C" {

void vitkernels_stand_in(Launch on_launch, int processors_, int major, int minor) {
  launch = on_launch;
  processors = processors_;
  capability[0] = major;
  capability[1] = minor;
}

void** __cudaRegisterFatBinary(void* wrapper) { return static_cast<void**>(wrapper); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void** wrapper, const char* host, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  kernels()[host] = {name, reinterpret_cast<FatBinary*>(wrapper)->data};
}
// of the <<<>>> that nvcc writes into every kernel's host side; launches here do not pass through it
int __cudaGetKernel(void**, const void*) { return 0; }
int __cudaPopCallConfiguration(Size*, Size*, size_t*, void*) { return 1; }
int __cudaLaunchKernel(void*, Size, Size, void**, size_t, void*) { return 1; }

int cudaLaunchKernel(const void* host, Size grid, Size block, void** arguments, size_t shared,
                     void* on_stream) {
  if (guards == 0) return last_error = 201;           // invalid device context: of whose device?
  if (on_stream != &stream) return last_error = 400;  // invalid resource handle: not the current stream
  const auto found = kernels().find(host);
  if (found == kernels().end() || !launch) return last_error = 98;  // invalid device function
  return last_error = launch(found->second.name.c_str(), found->second.code, &grid.x, &block.x, shared, arguments);
}
int cudaFuncSetAttribute(const void*, int, int) { return 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == kMultiprocessors ? processors : attribute == kMajor ? capability[0] : capability[1];
  return attribute == kMultiprocessors || attribute == kMajor || attribute == kMinor ? 0 : 1;
}
// BLOCKS_AT_ONCE of cuda.py: a few, so that blocks take several rows; how many fit is ptxas's to say
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 4;
  return 0;
}
int cudaGetLastError() {
  const int error = last_error;
  last_error = 0;
  return error;
}
const char* cudaGetErrorString(int error) { return error == 98 ? "invalid device function" : "invalid configuration argument"; }

int vitkernels_guards() { return guards; }

// torch's own, which only its CUDA builds have
int aoti_torch_create_cuda_guard(int, void** guard) {
  *guard = &guards;
  ++guards;
  return 0;
}
int aoti_torch_delete_cuda_guard(void* guard) {
  --*static_cast<int*>(guard);
  return 0;
}
int aoti_torch_get_current_cuda_stream(int, void** current) {
  *current = &stream;
  return 0;
}
}
