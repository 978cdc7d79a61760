// What CUDA C++ compiles to and Triton does not: local memory, calls, dynamic and static shared memory, atomics,
// lanes that part ways, shuffles, votes, inline assembly. nvcc -arch=sm_90 -ptx reduce.cu
#include <cuda_bf16.h>

// The sum of n entries of a table that lies in local memory, as its index is not known.
__device__ __noinline__ float strided_sum(float step, int n) {
  float table[8];
  for (int i = 0; i < 8; i++) table[i] = step * i;
  float sum = 0;
  for (int i = 0; i < n; i++) sum += table[(i * 3) & 7];
  return sum;
}

// Sums of blocks by shuffles; the first thread adds to out[0], and each block counts its positive elements in out[1].
extern "C" __global__ void block_sums(const float* __restrict__ x, float* out, int n) {
  extern __shared__ float partial[];
  __shared__ int warps;
  if (threadIdx.x == 0) warps = 0;
  __syncthreads();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float v = i < n ? x[i] : 0.f;
  const int positive = __syncthreads_count(v > 0);
  for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(0xffffffff, v, offset);
  if (threadIdx.x % 32 == 0) {
    partial[threadIdx.x / 32] = v;
    atomicAdd(&warps, 1);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    float t = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0;
#pragma unroll 1
    for (int k = 1; k < (int)(threadIdx.x & 3) + 2; k++) t += k;
    __syncwarp();
    const unsigned votes = __ballot_sync(0xffffffff, t > 3);
    if (threadIdx.x == 0) {
      atomicAdd(out, strided_sum(t, warps) + __popc(votes));
      atomicAdd(out + 1, (float)positive);
    }
  }
}

// The last block to come adds up what all wrote: a fence and an atomic order them.
extern "C" __global__ void last_block(const __nv_bfloat16* x, float* sums, unsigned* done, float* out, int n) {
  __shared__ bool last;
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    v += __bfloat162float(__hmul(x[i], __float2bfloat16(2.f)));
  v += __shfl_down_sync(0xffffffff, v, 16);
  v += __shfl_down_sync(0xffffffff, v, 8);
  v += __shfl_down_sync(0xffffffff, v, 4);
  v += __shfl_down_sync(0xffffffff, v, 2);
  v += __shfl_down_sync(0xffffffff, v, 1);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = v;
    __threadfence();
    last = atomicInc(done, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncwarp();
  if (last && threadIdx.x == 0) {
    float total = 0;
    for (unsigned i = 0; i < gridDim.x; i++) total += sums[i];
    *out = total;
  }
}

// A warp that copies and one that adds, through a ring of two buffers and mbarriers, as inline assembly.
extern "C" __global__ void ring(const float* __restrict__ x, float* out, int steps) {
  __shared__ alignas(128) float buffer[2][32];
  __shared__ alignas(8) unsigned long long full[2], empty[2];
  auto address = [](const void* p) { return (unsigned)__cvta_generic_to_shared(p); };
  auto wait = [&](const void* bar, int parity) {
    asm volatile(
        "{\n .reg .pred done;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        " @done bra.uni LEAVE;\n bra.uni AGAIN;\nLEAVE:\n}" ::"r"(address(bar)), "r"(parity) : "memory");
  };
  if (threadIdx.x == 0)
    for (int s = 0; s < 2; s++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&full[s])));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 32;" ::"r"(address(&empty[s])));
    }
  __syncthreads();
  if (threadIdx.x < 32) {
    for (int k = 0; k < steps; k++) {
      const int s = k % 2, turn = k / 2 % 2;
      wait(&empty[s], turn ^ 1);
      if (threadIdx.x == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 128;" ::"r"(address(&full[s])) : "memory");
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 128, [%2];" ::"r"(
                address(buffer[s])), "l"(x + 32 * k), "r"(address(&full[s])) : "memory");
      }
    }
  } else {
    float sum = 0;
    for (int k = 0; k < steps; k++) {
      const int s = k % 2, turn = k / 2 % 2;
      wait(&full[s], turn);
      sum += buffer[s][threadIdx.x - 32];
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(&empty[s])) : "memory");
    }
    out[threadIdx.x - 32] = sum;
  }
}
