// The operator surface on one page. Who answers a call: autocast.cpp, then autograd.cpp, then cpu/ or cuda/;
// vmap, backends without a kernel here and Meta take composites.cpp.
#include <torch/library.h>

namespace mlpext {

TORCH_LIBRARY(mlpext, m) {
  m.def("activation(Tensor input, str name, float[] params) -> Tensor");
  m.def("activation_(Tensor(a!) input, str name, float[] params) -> Tensor(a!)");
  m.def(
      "activation_backward(Tensor grad_output, Tensor saved, str name, float[] params, bool from_output) -> "
      "Tensor");

  m.def("maxout(Tensor input, int pieces, int dim=-1) -> Tensor");
  m.def("maxout_forward(Tensor input, int pieces, int dim=-1) -> (Tensor output, Tensor index)");
  m.def("maxout_backward(Tensor grad_output, Tensor index, int pieces, int dim=-1) -> Tensor");

  m.def("gated(Tensor gate, Tensor value, str name, float[] params) -> Tensor");
  // Without the gradient of the gate `value` may be left out.
  m.def(
      "gated_backward(Tensor grad_output, Tensor gate, Tensor? value, str name, float[] params, "
      "bool[2] output_mask) -> (Tensor, Tensor)");

  m.def("linear_activation(Tensor input, Tensor weight, Tensor? bias, str name, float[] params) -> Tensor");
  m.def(
      "linear_activation_forward(Tensor input, Tensor weight, Tensor? bias, str name, float[] params, "
      "bool keep_preactivation) -> (Tensor output, Tensor preactivation)");
  m.def(
      "linear_activation_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor? saved, str "
      "name, "
      "float[] params, bool from_output, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");

  m.def("linear_maxout(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_maxout_forward(Tensor input, Tensor weight, Tensor? bias) -> (Tensor output, Tensor index)");
  m.def(
      "linear_maxout_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor index, int pieces, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)");

  m.def("linear_gated(Tensor input, Tensor weight, Tensor? bias, str name, float[] params) -> Tensor");
  m.def(
      "linear_gated_forward(Tensor input, Tensor weight, Tensor? bias, str name, float[] params) -> "
      "(Tensor output, Tensor preactivation)");
  m.def(
      "linear_gated_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor preactivation, "
      "str name, float[] params, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");

  m.def("mlp(Tensor input, Tensor[] weights, Tensor[] biases, int[] activations, float[] params) -> Tensor");
  // A layer is gated where its weight has three dimensions and its activation is not -1, a maxout.
  // `kept` are the outputs of all layers but the last, in the place of a gated layer's its preactivation,
  // from which the output is formed again; then what a device may add for its own backward (CUDA:
  // cuda/mlp.cpp); then, of those of them that need it, preactivations and indices of the winner. `last` is
  // that of the last layer.
  m.def(
      "mlp_forward(Tensor input, Tensor[] weights, Tensor[] biases, int[] activations, float[] params) -> "
      "(Tensor output, Tensor last, Tensor[] kept)");
  // The gradients of input, weights and biases where output_mask has a 1.
  m.def(
      "mlp_backward(Tensor grad_output, Tensor input, Tensor[] weights, Tensor[] biases, Tensor[] kept, "
      "Tensor? last, bool last_is_output, int[] activations, float[] params, int[] output_mask) -> Tensor[]");
}

}  // namespace mlpext
