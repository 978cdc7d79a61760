// patch_embed: the schemas of vitkernels/ops/patch_embed.py on the CPU. Patches are gathered, scaled and normalised into
// a buffer of a few images at a time, which the vendor's product then reads from cache.
#include "gemm.h"
#include "shared/ops.h"

#include <cstring>
#include <type_traits>

namespace vk {
namespace {

constexpr int64_t kTokensAtOnce = 2048;

struct Grid : PatchGrid {
  Tensor keep_tensor;

  Grid(const Tensor& image, const Tensor& weight, const Maybe& keep_, const Tensor& none)
      : PatchGrid(patch_grid(image, weight, keep_)), keep_tensor(keep_ ? packed(*keep_) : none) {
    keep = keep_ ? reinterpret_cast<const int64_t*>(bytes(keep_tensor)) : nullptr;
    for (int64_t i = 0; keep && i < batch * tokens; ++i) {
      STD_TORCH_CHECK(keep[i] >= 0 && keep[i] < patches(), "patch_embed: argument 'keep' holds index ", keep[i],
                      "; needs 0 to ", patches() - 1);
    }
  }
  int64_t images_at_once() const { return std::max<int64_t>(1, kTokensAtOnce / std::max<int64_t>(tokens, 1)); }
};

template <class A>
class Pixels {
 public:
  Pixels(const Tensor& image, const MaybeNumbers& mean, const MaybeNumbers& std)
      : data_(bytes(image)),
        dtype_(dtype_of(image)),
        step_{image.stride(0), image.stride(1), image.stride(2), image.stride(3)} {
    for (int64_t c = 0; c < image.size(1); ++c) {
      const PixelScale scale = pixel_scale(mean, std, c, dtype_);
      factor_.push_back(A(scale.factor));
      offset_.push_back(A(scale.offset));
    }
    scaled_ = mean || std || dtype_ == DType::u8;
  }
  // `count` pixels of one row of one channel as `dtype`: where they lie already, or in `converted`
  const char* row(A* buffer, char* converted, DType dtype, int64_t b, int64_t c, int64_t y, int64_t x,
                  int64_t count) const {
    const int64_t at = b * step_[0] + c * step_[1] + y * step_[2] + x * step_[3];
    const char* in = data_ + at * size_of(dtype_);
    if (!scaled_ && step_[3] == 1 && dtype_ == dtype) return in;
    kernels<A>().load(buffer, in, dtype_, step_[3], count);
    if (scaled_) kernels<A>().scale(buffer, factor_[c], offset_[c], count);
    if (dtype == same_dtype<A>()) return reinterpret_cast<const char*>(buffer);
    kernels<A>().store(converted, dtype, 1, buffer, count);
    return converted;
  }

 private:
  const char* data_;
  DType dtype_;
  int64_t step_[4];
  bool scaled_;
  std::vector<A> factor_, offset_;
};

// `count` pieces of one row of pixels, each to its own patch. The usual sizes are known to the compiler: a call of
// memcpy takes longer than so few bytes.
void spread(char* to, int64_t to_step, const char* from, int64_t piece, int64_t count) {
  const auto copy = [&](auto size) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * to_step, from + i * piece, size_t(size));
  };
  switch (piece) {
    case 28: return copy(std::integral_constant<size_t, 28>());
    case 32: return copy(std::integral_constant<size_t, 32>());
    case 56: return copy(std::integral_constant<size_t, 56>());
    case 64: return copy(std::integral_constant<size_t, 64>());
    default: return copy(piece);
  }
}

// Patches of images [begin, end) as rows of `out`, [tokens, C * P * P] in its dtype. Whole rows of pixels are converted
// at once where neighbouring patches are all wanted.
template <class A>
void gather(const Tensor& out, const Grid& grid, const Pixels<A>& pixels, int64_t begin, int64_t end) {
  const DType dtype = dtype_of(out);
  const int64_t size = size_of(dtype), piece = grid.columns * size, width = grid.patch_size() * size;
  const int64_t run = grid.keep ? 1 : grid.across, runs = grid.keep ? grid.tokens : grid.down;
  parallel((end - begin) * runs, 4, [&](int64_t first, int64_t last) {
    Buffer<A> buffer(run * grid.columns);
    Buffer<char> converted(run * piece);
    for (int64_t r = first; r < last; ++r) {
      const int64_t b = begin + r / runs, t = r % runs * run, patch = grid.patch(b, t);
      char* to = bytes(out) + ((b - begin) * grid.tokens + t) * width;
      for (int64_t c = 0; c < grid.channels; ++c) {
        for (int64_t y = 0; y < grid.rows; ++y) {
          const char* line = pixels.row(buffer.get(), converted.get(), dtype, b, c, grid.top(patch) + y,
                                        grid.left(patch), run * grid.columns);
          spread(to + (c * grid.rows + y) * piece, width, line, piece, run);
        }
      }
    }
  });
}

}  // namespace

Tensor patch_embed(const Tensor& image, const Tensor& weight, const Maybe& bias, const MaybeNumbers& mean,
                   const MaybeNumbers& std, const Maybe& prefix, const Maybe& pos_embed, const Maybe& keep) {
  const Grid grid(image, weight, keep, image);
  const int64_t width = weight.size(0), prefixes = prefix ? prefix->size(0) : 0;
  const int64_t out_tokens = prefixes + grid.tokens;
  // one product and nothing to add: its result is the op's
  const bool alone = !prefix && !pos_embed && grid.batch > 0 && grid.batch <= grid.images_at_once();
  const ScalarType out_type = wider(wider(weight.scalar_type(), prefix), pos_embed);
  Tensor out = alone ? nothing(image) : empty({grid.batch, out_tokens, width}, out_type);
  const Tensor weights = flat_weight(weight);
  with_accumulate(weight.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const Pixels<A> pixels(image, mean, std);
    const Vector<A> table(pos_embed), front(prefix);
    // row p of the position table belongs to patch p - first; a table of the patches alone has no rows for the prefix
    const int64_t first = pos_embed ? pos_embed->size(0) - grid.patches() : 0;
    const DType out_dtype = dtype_of(out);
    const int64_t out_row = width * size_of(out_dtype);
    for (int64_t begin = 0; begin < grid.batch; begin += grid.images_at_once()) {
      const int64_t end = std::min(grid.batch, begin + grid.images_at_once());
      const Tensor patches = empty(weight, {(end - begin) * grid.tokens, grid.patch_size()});
      gather(patches, grid, pixels, begin, end);
      const Shape shape = alone ? Shape{grid.batch, out_tokens, width} : Shape{patches.size(0), width};
      const Tensor tokens = linear(Matrix(patches), Matrix(weights), bias, shape);
      if (alone) {
        out = tokens;
        return;
      }
      const DType token_dtype = dtype_of(tokens);
      parallel((end - begin) * out_tokens, 16, [&](int64_t from, int64_t to) {
        Buffer<A> row(width);
        for (int64_t i = from; i < to; ++i) {
          const int64_t b = i / out_tokens, t = i % out_tokens - prefixes;
          if (t < 0) {
            std::copy_n(front.get() + (t + prefixes) * width, width, row.get());
          } else {
            const char* token = bytes(tokens) + (b * grid.tokens + t) * width * size_of(token_dtype);
            kernels<A>().load(row.get(), token, token_dtype, 1, width);
          }
          const int64_t at = t < 0 ? (first > 0 ? t + prefixes : -1) : first + grid.patch(begin + b, t);
          if (table.get() && at >= 0) {
            const A* position = table.get() + at * width;
            for (int64_t j = 0; j < width; ++j) row.get()[j] += position[j];
          }
          kernels<A>().store(bytes(out) + (begin * out_tokens + i) * out_row, out_dtype, 1, row.get(), width);
        }
      });
    }
  });
  return out;
}

namespace {

// Sums of dout over the batch for each row of a full position table (prefix rows first): the gradients of positions,
// prefix and bias are all read off it.
template <class A>
std::vector<A> position_sums(const Tensor& dout, const Grid& grid, int64_t prefixes) {
  const int64_t width = dout.size(2), table_rows = prefixes + grid.patches();
  std::vector<std::vector<int64_t>> sources(table_rows);  // rows b * tokens + t of dout
  for (int64_t b = 0; b < grid.batch; ++b) {
    for (int64_t t = 0; t < dout.size(1); ++t) {
      sources[t < prefixes ? t : prefixes + grid.patch(b, t - prefixes)].push_back(b * dout.size(1) + t);
    }
  }
  const DType dtype = dtype_of(dout);
  std::vector<A> sums(table_rows * width);
  parallel(table_rows, 4, [&](int64_t begin, int64_t end) {
    Buffer<A> row(width);
    for (int64_t p = begin; p < end; ++p) {
      A* to = sums.data() + p * width;
      for (const int64_t source : sources[p]) {
        kernels<A>().load(row.get(), bytes(dout) + source * width * size_of(dtype), dtype, 1, width);
        for (int64_t j = 0; j < width; ++j) to[j] += row.get()[j];
      }
    }
  });
  return sums;
}

// The rows of dout that belong to patches of images [begin, end), in weight's dtype.
template <class A>
Tensor patch_rows(const Tensor& dout, const Tensor& weight, const Grid& grid, int64_t begin, int64_t end) {
  const int64_t width = dout.size(2), prefixes = dout.size(1) - grid.tokens;
  const Tensor out = empty(weight, {(end - begin) * grid.tokens, width});
  const DType dtype = dtype_of(dout), out_dtype = dtype_of(out);
  const int64_t row = width * size_of(dtype), out_row = width * size_of(out_dtype);
  parallel((end - begin) * grid.tokens, 16, [&](int64_t from, int64_t to) {
    Buffer<A> buffer(width);
    for (int64_t i = from; i < to; ++i) {
      const char* source = bytes(dout) + ((begin + i / grid.tokens) * dout.size(1) + prefixes + i % grid.tokens) * row;
      char* target = bytes(out) + i * out_row;
      if (dtype == out_dtype) {
        std::memcpy(target, source, size_t(row));
        continue;
      }
      kernels<A>().load(buffer.get(), source, dtype, 1, width);
      kernels<A>().store(target, out_dtype, 1, buffer.get(), width);
    }
  });
  return out;
}

// Adds the patches' gradients back into images [begin, end).
template <class A>
void scatter(const Tensor& dimage, const Tensor& dpatches, const Grid& grid, const MaybeNumbers& std, int64_t begin,
             int64_t end) {
  const DType dtype = dtype_of(dpatches), out_dtype = dtype_of(dimage);
  const int64_t width = grid.patch_size(), size = size_of(dtype);
  const int64_t height = grid.down * grid.rows, line = grid.across * grid.columns;
  parallel(end - begin, 1, [&](int64_t from, int64_t to) {
    Buffer<A> pixels(grid.channels * height * line), patch(width);
    for (int64_t b = from; b < to; ++b) {
      std::fill_n(pixels.get(), grid.channels * height * line, A(0));
      for (int64_t t = 0; t < grid.tokens; ++t) {
        const int64_t p = grid.patch(begin + b, t);
        kernels<A>().load(patch.get(), bytes(dpatches) + (b * grid.tokens + t) * width * size, dtype, 1, width);
        for (int64_t c = 0; c < grid.channels; ++c) {
          for (int64_t y = 0; y < grid.rows; ++y) {
            A* at = pixels.get() + (c * height + grid.top(p) + y) * line + grid.left(p);
            const A* piece = patch.get() + (c * grid.rows + y) * grid.columns;
            for (int64_t x = 0; x < grid.columns; ++x) at[x] += piece[x];
          }
        }
      }
      const int64_t channel = height * line;
      for (int64_t c = 0; c < grid.channels; ++c) {
        A* plane = pixels.get() + c * channel;
        for (int64_t i = 0; std && i < channel; ++i) plane[i] /= A((*std)[c]);
        const int64_t at = ((begin + b) * grid.channels + c) * channel;
        kernels<A>().store(bytes(dimage) + at * size_of(out_dtype), out_dtype, 1, plane, channel);
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> patch_embed_backward(
    const Tensor& dout_, const Tensor& image, const Tensor& weight, const MaybeNumbers& mean, const MaybeNumbers& std,
    const Maybe& prefix, const Maybe& pos_embed, const Maybe& keep, const std::vector<bool>& needs) {
  const Grid grid(image, weight, keep, image);
  const Tensor dout = packed(dout_);
  const int64_t width = weight.size(0), prefixes = prefix ? prefix->size(0) : 0;
  const Tensor weights = flat_weight(weight);
  Tensor dimage = needs[0] ? empty(image, shape_of(image)) : nothing(weight);
  Tensor dweight = nothing(weight), dbias = nothing(weight), dprefix = nothing(weight), dpos = nothing(weight);
  with_accumulate(weight.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    if (needs[2] && !prefix && !needs[4]) {
      dbias = gradient_of_bias(Matrix(dout), weight.scalar_type());
    } else if (needs[2] || needs[3] || needs[4]) {
      const std::vector<A> sums = position_sums<A>(dout, grid, prefixes);
      if (needs[2]) {
        std::vector<A> bias(width);
        for (int64_t i = prefixes * width; i < int64_t(sums.size()); ++i) bias[i % width] += sums[i];
        dbias = from_values<A>({width}, weight.scalar_type(), bias.data());
      }
      if (needs[3]) dprefix = from_values<A>(shape_of(*prefix), prefix->scalar_type(), sums.data());
      if (needs[4]) {
        const int64_t skipped = int64_t(sums.size()) - pos_embed->numel();
        dpos = from_values<A>(shape_of(*pos_embed), pos_embed->scalar_type(), sums.data() + skipped);
      }
    }
    if (!needs[0] && !needs[1]) return;
    const Pixels<A> pixels(image, mean, std);
    const bool in_place = prefixes == 0 && dout.scalar_type() == weight.scalar_type();
    Tensor all_rows = reshaped(dout, {dout.size(0) * dout.size(1), width});
    const bool one_part = grid.batch > 0 && grid.batch <= grid.images_at_once();
    std::vector<A> weight_sums(needs[1] && !one_part ? weight.numel() : 0);
    for (int64_t begin = 0; begin < grid.batch; begin += grid.images_at_once()) {
      const int64_t end = std::min(grid.batch, begin + grid.images_at_once()), tokens = (end - begin) * grid.tokens;
      // the patch tokens' gradients, without the prefix's
      const Tensor g = in_place ? torch::stable::narrow(all_rows, 0, begin * grid.tokens, tokens)
                                : patch_rows<A>(dout, weight, grid, begin, end);
      if (needs[1]) {
        const Tensor patches = empty(weight, {tokens, grid.patch_size()});
        gather(patches, grid, pixels, begin, end);
        const Tensor part = gradient_of_weight(Matrix(g), Matrix(patches), shape_of(weight), weight.scalar_type());
        if (one_part) {
          dweight = part;
        } else {
          const Vector<A> values(part);
          for (int64_t i = 0; i < part.numel(); ++i) weight_sums[i] += values.get()[i];
        }
      }
      if (needs[0]) {
        const Tensor dpatches = gradient_of_input(Matrix(g), Matrix(weights), {tokens, grid.patch_size()});
        scatter<A>(dimage, dpatches, grid, std, begin, end);
      }
    }
    if (!weight_sums.empty()) {
      dweight = from_values<A>(shape_of(weight), weight.scalar_type(), weight_sums.data());
    }
  });
  return {dimage, dweight, dbias, dprefix, dpos};
}

}  // namespace vk
