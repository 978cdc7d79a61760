// Where the patches of an image lie, which of them are kept, and what is done to a pixel.
#pragma once
#include <optional>
#include <vector>

#include "types.h"

namespace vk {

struct PatchGrid {
  int64_t batch, channels, down, across, rows, columns;  // `rows` x `columns` pixels a patch
  int64_t tokens;                                        // patches kept of each image
  const int64_t* keep;                                   // [batch, tokens], or null for all

  VK_BOTH int64_t patches() const { return down * across; }
  VK_BOTH int64_t patch_size() const { return channels * rows * columns; }
  VK_BOTH int64_t patch(int64_t b, int64_t t) const { return keep ? keep[b * tokens + t] : t; }
  VK_BOTH int64_t top(int64_t patch) const { return patch / across * rows; }
  VK_BOTH int64_t left(int64_t patch) const { return patch % across * columns; }
};

// (pixel / 255 - mean) / std as one multiplication and one addition; the division by 255 is uint8's alone.
struct PixelScale {
  double factor, offset;
};
inline PixelScale pixel_scale(const std::optional<std::vector<double>>& mean,
                              const std::optional<std::vector<double>>& std, int64_t channel, DType dtype) {
  const double m = mean ? (*mean)[channel] : 0, s = std ? (*std)[channel] : 1;
  return {1 / (s * (dtype == DType::u8 ? 255 : 1)), -m / s};
}

}  // namespace vk
