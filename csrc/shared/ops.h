// The implementations of the schemas of vitkernels/ops/*.py: same arguments, same order. register.h ties them.
#pragma once
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace vk {

using Maybe = std::optional<Tensor>;
using MaybeNumbers = std::optional<std::vector<double>>;

Tensor linear_forward(const Tensor& x, const Tensor& weight, const Maybe& bias);
// grad_dtype, of the gradients of weights and biases, is a ScalarType's number too, or 0 for the weights' own
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                   const std::vector<bool>& needs, int64_t grad_dtype);
inline ScalarType dtype_for(int64_t grad_dtype, const Tensor& weight) {
  return grad_dtype ? ScalarType(grad_dtype) : weight.scalar_type();
}

using Norm = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using NormBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// out_dtype is a ScalarType's number: see vitkernels/ops/_amp.py
Norm add_layer_norm(const Tensor& x, const Maybe& branch, const Maybe& weight, const Maybe& bias, double eps,
                    const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale, int64_t out_dtype);
NormBackward add_layer_norm_backward(const Maybe& dtotal, const Maybe& dnormed, const Tensor& total,
                                     const Maybe& branch, const Maybe& weight, const Tensor& mean, const Tensor& rstd,
                                     const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale,
                                     std::optional<ScalarType> branch_dtype, const std::vector<bool>& needs);
Norm add_rms_norm(const Tensor& x, const Maybe& branch, const Maybe& weight, const Maybe& bias, double eps,
                  const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale, int64_t out_dtype);
NormBackward add_rms_norm_backward(const Maybe& dtotal, const Maybe& dnormed, const Tensor& total, const Maybe& branch,
                                   const Maybe& weight, const Tensor& mean, const Tensor& rstd,
                                   const Maybe& branch_bias, const Maybe& scale, const Maybe& row_scale,
                                   std::optional<ScalarType> branch_dtype, const std::vector<bool>& needs);

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask,
                                     bool is_causal, double scale);
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                              const Tensor& v, const Tensor& out, const Tensor& stats,
                                                              const Maybe& mask, bool is_causal, double scale,
                                                              bool needs_mask);
std::tuple<Tensor, Tensor> attention_qkv(const Tensor& qkv, int64_t num_heads, const Maybe& mask, bool is_causal,
                                         double scale);
std::tuple<Tensor, Tensor> attention_qkv_backward(const Tensor& dout, const Tensor& qkv, const Tensor& out,
                                                  const Tensor& stats, int64_t num_heads, const Maybe& mask,
                                                  bool is_causal, double scale, bool needs_mask);

std::tuple<Tensor, Tensor> attention_rel_pos(const Tensor& q, const Maybe& k, const Maybe& v, const Tensor& rel_h,
                                             const Tensor& rel_w, double scale);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_rel_pos_backward(
    const Tensor& dout, const Tensor& q, const Maybe& k, const Maybe& v, const Tensor& out, const Tensor& stats,
    const Tensor& rel_h, const Tensor& rel_w, double scale, bool needs_rel);

std::tuple<Tensor, Tensor> attention_varlen(const Tensor& q, const Maybe& k, const Maybe& v,
                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                            int64_t max_seqlen_q, int64_t max_seqlen_k, bool is_causal, double scale);
std::tuple<Tensor, Tensor, Tensor> attention_varlen_backward(const Tensor& dout, const Tensor& q, const Maybe& k,
                                                             const Maybe& v, const Tensor& out, const Tensor& stats,
                                                             const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                             int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                             bool is_causal, double scale);

std::tuple<Tensor, Tensor> mlp(const Tensor& x, const Tensor& w1, const Maybe& b1, const Tensor& w2, const Maybe& b2,
                               const std::string& activation, bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(const Tensor& dy, const Tensor& x, const Tensor& pre,
                                                                const Tensor& w1, const Tensor& w2,
                                                                const std::string& activation,
                                                                const std::vector<bool>& needs, int64_t grad_dtype);

std::tuple<Tensor, Tensor> glu_mlp(const Tensor& x, const Tensor& w_gate_up, const Maybe& b_gate_up,
                                   const Maybe& w_up, const Maybe& b_up, const Tensor& w_down, const Maybe& b_down,
                                   const std::string& activation, bool save);
using GluMlpBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
GluMlpBackward glu_mlp_backward(const Tensor& dy, const Tensor& x, const Tensor& pre, const Tensor& w_gate_up,
                                const Maybe& w_up, const Tensor& w_down, const std::string& activation,
                                const std::vector<bool>& needs, int64_t grad_dtype);

Tensor patch_embed(const Tensor& image, const Tensor& weight, const Maybe& bias, const MaybeNumbers& mean,
                   const MaybeNumbers& std, const Maybe& prefix, const Maybe& pos_embed, const Maybe& keep);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> patch_embed_backward(
    const Tensor& dout, const Tensor& image, const Tensor& weight, const MaybeNumbers& mean, const MaybeNumbers& std,
    const Maybe& prefix, const Maybe& pos_embed, const Maybe& keep, const std::vector<bool>& needs);

Tensor rotary(const Tensor& x, const Tensor& sin, const Tensor& cos, int64_t prefix, bool half);
std::tuple<Tensor, Tensor, Tensor> rotary_backward(const Tensor& dout, const Maybe& x, const Tensor& sin,
                                                   const Tensor& cos, int64_t prefix, bool half,
                                                   const std::vector<bool>& needs);

Tensor rotary_qkv(const Tensor& qkv, const Maybe& sin, const Maybe& cos, int64_t prefix, bool half,
                  const std::string& norm, const Maybe& q_weight, const Maybe& q_bias, const Maybe& k_weight,
                  const Maybe& k_bias, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rotary_qkv_backward(
    const Tensor& dout, const Maybe& qkv, const Maybe& sin, const Maybe& cos, int64_t prefix, bool half,
    const std::string& norm, const Maybe& q_weight, const Maybe& k_weight, double eps, const std::vector<bool>& needs);

int64_t configure(const std::string& name, int64_t value);

}  // namespace vk
