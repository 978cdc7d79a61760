// patch_embed: the schemas of vitkernels/ops/patch_embed.py on CUDA. Patches are gathered, normalised and cast straight
// into the rows that cuBLAS multiplies, a bounded number of tokens at a time.
#include "cuda/patch_embed.cuh"

#include "cuda/column_sums.cuh"
#include "cuda/launch.h"
#include "shared/products.h"

namespace vk {
namespace {

constexpr int64_t kTokensAtOnce = 8192;  // their product fills any chip; 13 MB of rows in ViT-B and 16 bits
constexpr int64_t kImagesPerPart = 16, kMostParts = 65535;  // along a grid's y
constexpr Rows kNoRows{nullptr, DType::f32, 0, 0};

struct Patches : PatchGrid {
  Tensor keep_tensor;
  Patches(const Tensor& image, const Tensor& weight, const Maybe& keep_)
      : PatchGrid(patch_grid(image, weight, keep_)), keep_tensor(keep_ ? packed(*keep_) : image) {
    keep = keep_ ? static_cast<const int64_t*>(keep_tensor.data_ptr()) : nullptr;
  }
  int64_t images_at_once() const { return std::max<int64_t>(1, kTokensAtOnce / std::max<int64_t>(tokens, 1)); }
};

dim3 threads_for(int64_t width) {
  return dim3(unsigned(std::min<int64_t>(round_up(blocks(width, kLanes), kWarp), 256)));
}

void check_channels(const Patches& grid, const MaybeNumbers& mean, const MaybeNumbers& std, DType dtype) {
  STD_TORCH_CHECK((!mean && !std && dtype != DType::u8) || grid.channels <= kMostChannels,
                  "patch_embed: the CUDA C++ kernels normalise up to ", kMostChannels, " channels; got ",
                  grid.channels);
}

// Patches of images [begin, end) as rows in weight's dtype.
Tensor gather(const Launches& launches, const Patches& grid, const Tensor& image, const Tensor& weight,
              const MaybeNumbers& mean, const MaybeNumbers& std, int64_t begin, int64_t end) {
  const Tensor out = empty(weight, {(end - begin) * grid.tokens, grid.patch_size()});
  const DType dtype = dtype_of(image);
  Pixels a{grid, begin, bytes(image), dtype, {}, out_rows(out), mean || std || dtype == DType::u8, {}, {}};
  const int64_t alignment = dtype == DType::u8 ? 8 : 16;
  bool aligned = grid.columns % kLanes == 0 && image.stride(3) == 1 && is_aligned(a.out, grid.patch_size()) &&
                 reinterpret_cast<uintptr_t>(a.image) % alignment == 0;
  for (int i = 0; i < 4; ++i) {
    a.step[i] = image.stride(i);
    aligned = aligned && (i == 3 || image.size(i) == 1 || a.step[i] % kLanes == 0);
  }
  for (int64_t c = 0; a.scaled && c < grid.channels; ++c) {
    const PixelScale scale = pixel_scale(mean, std, c, dtype);
    a.factor[c] = float(scale.factor);
    a.offset[c] = float(scale.offset);
  }
  launches("gather_patches", aligned ? gather_patches<true> : gather_patches<false>, {out.size(0)},
           threads_for(grid.patch_size()), 0, a);
  return out;
}

}  // namespace

Tensor patch_embed(const Tensor& image, const Tensor& weight, const Maybe& bias, const MaybeNumbers& mean,
                   const MaybeNumbers& std, const Maybe& prefix, const Maybe& pos_embed, const Maybe& keep) {
  const Patches grid(image, weight, keep);
  check_channels(grid, mean, std, dtype_of(image));
  const int64_t width = weight.size(0), prefixes = prefix ? prefix->size(0) : 0, each = prefixes + grid.tokens;
  // one product and nothing to add: its result is the op's
  const bool alone = !prefix && !pos_embed && grid.batch > 0 && grid.batch <= grid.images_at_once();
  const ScalarType dtype = wider(wider(weight.scalar_type(), prefix), pos_embed);
  Tensor out = alone ? nothing(weight) : empty(weight, {grid.batch, each, width}, dtype);
  const Tensor weights = flat_weight(weight);
  const Launches launches("patch_embed", image, {&weight, given(prefix), given(pos_embed)});
  std::optional<Operand> prefix_rows, table_rows;
  if (prefix) prefix_rows.emplace(*prefix);
  if (pos_embed) table_rows.emplace(*pos_embed);
  for (int64_t begin = 0; begin < grid.batch; begin += grid.images_at_once()) {
    const int64_t end = std::min(grid.batch, begin + grid.images_at_once());
    const Tensor patches = gather(launches, grid, image, weight, mean, std, begin, end);
    const Shape token_shape = alone ? Shape{grid.batch, each, width} : Shape{patches.size(0), width};
    const Tensor tokens = linear(Matrix(patches), Matrix(weights), bias, token_shape);
    if (alone) return tokens;
    const Tokens a{grid,
                   begin,
                   prefixes,
                   pos_embed ? pos_embed->size(0) - grid.patches() : 0,
                   int(width),
                   Operand(tokens).rows,
                   prefix ? prefix_rows->rows : kNoRows,
                   pos_embed ? table_rows->rows : kNoRows,
                   out_rows(out)};
    const bool aligned = is_aligned(a.tokens, width) && is_aligned(a.prefix, width) && is_aligned(a.table, width) &&
                         is_aligned(a.out, width);
    launches("lay_out_tokens", aligned ? lay_out_tokens<true> : lay_out_tokens<false>, {(end - begin) * each},
             threads_for(width), 0, a);
  }
  return out;
}

namespace {

Tensor copied(const Tensor& t, ScalarType dtype) {
  Tensor out = empty(t, shape_of(t), dtype);
  torch::stable::copy_(out, t);
  return out;
}

// Sums of dout over the batch by row of a full position table (prefix rows first), [prefixes + patches, D] in float32:
// the gradients of positions, prefix and bias are all read off it. dout is packed.
Tensor position_sums(const Launches& launches, const Tensor& dout, const Patches& grid, int64_t prefixes) {
  const int64_t width = dout.size(2), rows = prefixes + grid.patches();
  if (!grid.keep) {
    const Tensor samples = torch::stable::reshape(dout, {grid.batch, rows * width});
    return torch::stable::reshape(column_sums(Matrix(samples), ScalarType::Float), {rows, width});
  }
  const int64_t images = std::max(kImagesPerPart, blocks(grid.batch, kMostParts));
  const int64_t parts = std::max<int64_t>(blocks(grid.batch, images), 1);
  const Tensor partial = empty(dout, {parts, rows, width}, ScalarType::Float);
  const PositionSums a{grid, prefixes, images, int(width), Operand(dout).rows, out_rows(partial)};
  const bool aligned = is_aligned(a.dout, width) && is_aligned(a.out, width);
  launches("sum_by_position", aligned ? sum_by_position<true> : sum_by_position<false>, {rows, parts},
           threads_for(width), 0, a);
  if (parts == 1) return torch::stable::reshape(partial, {rows, width});
  const Tensor samples = torch::stable::reshape(partial, {parts, rows * width});
  return torch::stable::reshape(column_sums(Matrix(samples), ScalarType::Float), {rows, width});
}

// The rows of dout that belong to patches of images [begin, end), in weight's dtype.
Matrix patch_rows(const Tensor& dout, const Tensor& weight, const Patches& grid, int64_t begin, int64_t end) {
  Tensor images = dout;  // `narrow` takes its tensor as one that may change
  Tensor some = torch::stable::narrow(images, 0, begin, end - begin);
  return Matrix(cast(torch::stable::narrow(some, 1, dout.size(1) - grid.tokens, grid.tokens), weight.scalar_type()));
}

// Adds the patches' gradients back into images [begin, end).
void scatter(const Launches& launches, const Tensor& dimage, const Tensor& dpatches, const Patches& grid,
             const MaybeNumbers& std, int64_t begin, int64_t end) {
  PatchGradients a{grid, begin, Operand(dpatches).rows, bytes(dimage), dtype_of(dimage), std.has_value(), {}};
  for (int64_t c = 0; std && c < grid.channels; ++c) a.factor[c] = float(1 / (*std)[c]);
  const bool aligned = is_aligned(a.dpatches, grid.patch_size());
  launches("scatter_patches", aligned ? scatter_patches<true> : scatter_patches<false>,
           {(end - begin) * grid.patches()}, threads_for(grid.patch_size()), 0, a);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> patch_embed_backward(
    const Tensor& dout_, const Tensor& image, const Tensor& weight, const MaybeNumbers& mean, const MaybeNumbers& std,
    const Maybe& prefix, const Maybe& pos_embed, const Maybe& keep, const std::vector<bool>& needs) {
  const Patches grid(image, weight, keep);
  check_channels(grid, mean, std, dtype_of(image));
  const Tensor dout = packed(dout_);
  const int64_t width = weight.size(0), prefixes = prefix ? prefix->size(0) : 0;
  Tensor dimage = needs[0] ? empty(image, shape_of(image)) : nothing(weight);
  Tensor dweight = nothing(weight), dbias = nothing(weight), dprefix = nothing(weight), dpos = nothing(weight);
  const Launches launches("patch_embed_backward", image, {&dout, &weight});
  if (needs[2] && !prefix && !needs[4]) {
    dbias = column_sums(Matrix(dout), weight.scalar_type());
  } else if (needs[2] || needs[3] || needs[4]) {
    Tensor sums = position_sums(launches, dout, grid, prefixes);
    const int64_t rows = sums.size(0);
    if (needs[2]) {
      dbias = column_sums(Matrix(torch::stable::narrow(sums, 0, prefixes, grid.patches())), weight.scalar_type());
    }
    if (needs[3]) dprefix = copied(torch::stable::narrow(sums, 0, 0, prefixes), prefix->scalar_type());
    if (needs[4]) {
      const int64_t skipped = rows - pos_embed->size(0);
      dpos = copied(torch::stable::narrow(sums, 0, skipped, rows - skipped), pos_embed->scalar_type());
    }
  }
  if (!needs[0] && !needs[1]) return {dimage, dweight, dbias, dprefix, dpos};

  const Tensor weights = flat_weight(weight);
  const int64_t at_once = grid.images_at_once(), parts = blocks(grid.batch, at_once);
  // each part's weight gradient is a row, and they are summed in order
  Tensor weight_parts = needs[1] && parts != 1 ? empty(weight, {parts, weight.numel()}) : nothing(weight);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = part * at_once, end = std::min(grid.batch, begin + at_once);
    const Matrix g = patch_rows(dout, weight, grid, begin, end);
    if (needs[1]) {
      const Matrix patches(gather(launches, grid, image, weight, mean, std, begin, end));
      const Tensor sum = gradient_of_weight(g, patches, shape_of(weight), weight.scalar_type());
      if (parts == 1) {
        dweight = sum;
      } else {
        Tensor row = torch::stable::narrow(weight_parts, 0, part, 1);
        torch::stable::copy_(row, torch::stable::reshape(sum, {1, weight.numel()}));
      }
    }
    if (needs[0]) {
      const Tensor dpatches = gradient_of_input(g, Matrix(weights), {g.rows, grid.patch_size()});
      scatter(launches, dimage, dpatches, grid, std, begin, end);
    }
  }
  if (needs[1] && parts != 1) {
    dweight = reshaped(column_sums(Matrix(weight_parts), weight.scalar_type()), shape_of(weight));
  }
  return {dimage, dweight, dbias, dprefix, dpos};
}

}  // namespace vk
