// CUTLASS's product for Hopper with an epilogue of ours: included by the files that are compiled once a dtype
// and direction, which set MLPEXT_ISA (a namespace), MLPEXT_APPROXIMATE, MLPEXT_ELEMENT (CUTLASS's type in
// memory), MLPEXT_FORWARD (1, or 0: the input's gradient) and MLPEXT_LAUNCH (the launcher's name).
#pragma once
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "epilogue.h"
#include "launchers.h"

namespace mlpext::MLPEXT_ISA {
namespace {

using M = MLPEXT_ELEMENT;
using cuda::ct::Product;
namespace fusion = ::cutlass::epilogue::fusion;
constexpr bool is_forward = MLPEXT_FORWARD;
constexpr auto rounding = ::cutlass::FloatRoundStyle::round_to_nearest;
constexpr int alignment = 8;  // elements: 16 bytes, what TMA takes

using Tile = cute::Shape<cute::Int<cuda::ct::tile>, cute::Int<cuda::ct::tile>, cute::_64>;
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
// Two groups of warps take turns: one has its epilogue while the other has the tensor cores.
using Schedule = ::cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using EpilogueSchedule = ::cutlass::epilogue::TmaWarpSpecialized;
using RowMajor = ::cutlass::layout::RowMajor;
using LayoutB = std::conditional_t<is_forward, ::cutlass::layout::ColumnMajor, RowMajor>;
using ElementC = std::conditional_t<is_forward, void, M>;

// The function that CUTLASS's visitor applies to a fragment of a thread's float values.
template <class T> struct Apply {
  using Arguments = Activation;
  __device__ __forceinline__ T operator()(const T& z, const Arguments& f) const {
    return forward<T::kElements>(f, z);
  }
  __device__ __forceinline__ T operator()(const T& dy, const T& kept, const Arguments& f) const {
    return backward<T::kElements>(f, dy, kept);
  }
};

using Describe = ::cutlass::epilogue::collective::detail::EpilogueDescriptor<
    Tile, ::cutlass::epilogue::collective::EpilogueTileAuto, ElementC, M, EpilogueSchedule>;
using DescribeZ = ::cutlass::epilogue::collective::detail::AuxStoreDescriptor<Describe, RowMajor, M>;

// A visitor that adds up its values down the rows of a warp, in float and always in the same order. CUTLASS's
// own (Sm90RowReduction) keeps its sums in local memory, and has one block add up all the tiles.
struct ColumnSums : fusion::Sm90VisitorImpl<> {
  struct SharedStorage {};
  struct Arguments {
    float* sums;  // as Product has it; null: nothing is added up
  };
  using Params = Arguments;

  template <class Shape>
  static Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Shape> static bool can_implement(const Shape&, const Arguments&) { return true; }
  template <class Shape> static std::size_t get_workspace_size(const Shape&, const Arguments&) { return 0; }
  template <class Shape>
  static ::cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                                ::cutlass::CudaHostAdapter* = nullptr) {
    return ::cutlass::Status::kSuccess;
  }

  Params params;
  __host__ __device__ ColumnSums() : params{} {}
  __host__ __device__ ColumnSums(const Params& params, const SharedStorage&) : params(params) {}

  template <class Sums, class To, class Coordinates, class Residue> struct Callbacks
      : fusion::EmptyConsumerStoreCallbacks {
    Sums sums;
    To to;
    Coordinates coordinates;
    Residue residue;  // coordinates beyond it lie beyond the matrix
    bool wanted;

    __device__ __forceinline__ Callbacks(Sums sums, To to, Coordinates coordinates, Residue residue,
                                         bool wanted)
        : sums(sums), to(to), coordinates(coordinates), residue(residue), wanted(wanted) {}

    template <class Accumulator, class Input, int n>
    __device__ __forceinline__ auto visit(const ::cutlass::Array<Accumulator, n>&, int v, int m, int n_,
                                          const ::cutlass::Array<Input, n>& values) {
      if (wanted) {
        const auto places = coordinates(cute::_, cute::_, cute::_, m, n_);
        auto some = sums(cute::_, cute::_, cute::_, m, n_);
#pragma unroll
        for (int i = 0; i < n; ++i)
          if (cute::elem_less(places(v * n + i), residue)) some(v * n + i) += values[i];
      }
      return values;
    }

    __device__ __forceinline__ void end() {
      if (!wanted) return;
      const auto from = cute::filter(sums);
      const auto place = cute::filter(to);
#pragma unroll
      for (int i = 0; i < cute::size(from); ++i) {
        float sum = from(i);
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
        if (threadIdx.x % 32 < 4) place(i) = sum;
      }
    }
  };

  template <bool of_source, class... Args> __device__ __forceinline__ auto get_consumer_store_callbacks(
      const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    const auto row = cute::get<0>(args.tile_coord_mnkl), column = cute::get<1>(args.tile_coord_mnkl);
    const int64_t width = cuda::ct::sum_columns(cute::get<1>(args.problem_shape_mnkl));
    const int64_t strip = row * int64_t(cuda::ct::strips) + args.thread_idx / 32;
    // end() wants every fourth lane to have the same columns.
    using Copy = std::remove_cvref_t<decltype(args.tiled_copy)>;
    constexpr auto lane_of_value = cute::Layout<cute::Shape<cute::_32, cute::Int<cuda::ct::strips>, cute::_1>,
                                                cute::Stride<cute::_1, cute::_0, cute::_0>>{};
    const auto lanes = cute::composition(
        lane_of_value,
        cute::right_inverse(Copy::get_layoutS_TV()).with_shape(cute::shape(typename Copy::Tiler_MN{})));
    static_assert(
        std::is_same_v<decltype(cute::filter(cute::get<0>(lanes))), cute::Layout<cute::_8, cute::_4>>);
    // One number a column: the same for all of a warp's rows.
    const auto layout =
        cute::make_layout(cute::take<0, 2>(Tile{}), cute::make_stride(cute::_0{}, cute::_1{}));
    const auto strip_sums =
        cute::make_tensor(cute::make_gmem_ptr(params.sums + strip * width + column * cuda::ct::tile), layout);
    const auto to = fusion::sm90_partition_for_epilogue<of_source>(strip_sums, args.epi_tile, args.tiled_copy,
                                                                   args.thread_idx);
    auto sums = cute::make_tensor_like<float>(to);
    cute::clear(sums);
    const bool wanted = params.sums && cute::elem_less(args.cD(cute::_0{}, cute::_0{}), args.residue_cD);
    return Callbacks<decltype(sums), decltype(to), decltype(args.tCcD), decltype(args.residue_tCcD)>(
        sums, to, args.tCcD, args.residue_tCcD, wanted);
  }
};

// Trees of visitors: f(z), z stored on the way, z = a b + bias
using Forward = fusion::Sm90EVT<
    fusion::Sm90Compute<Apply, M, float, rounding>,
    fusion::Sm90EVT<fusion::Sm90AuxStore<DescribeZ::Stages, typename DescribeZ::EpilogueTile, M, rounding,
                                         typename DescribeZ::Stride, typename DescribeZ::SmemLayoutAtom,
                                         typename DescribeZ::CopyOpR2S>,
                    fusion::Sm90EVT<fusion::Sm90Compute<::cutlass::plus, float, float, rounding>,
                                    fusion::Sm90AccFetch, fusion::Sm90RowBroadcast<0, Tile, M, float>>>>;
// and d = a b f'(c), d's sums on the way.
using Backward =
    fusion::Sm90EVT<ColumnSums, fusion::Sm90EVT<fusion::Sm90Compute<Apply, float, float, rounding>,
                                                fusion::Sm90AccFetch, fusion::Sm90SrcFetch<M>>>;
using Tree = std::conditional_t<is_forward, Forward, Backward>;

using Epilogue = typename ::cutlass::epilogue::collective::CollectiveBuilder<
    ::cutlass::arch::Sm90, ::cutlass::arch::OpClassTensorOp, Tile, Cluster,
    ::cutlass::epilogue::collective::EpilogueTileAuto, float, float, ElementC, RowMajor, alignment, M,
    RowMajor, alignment, EpilogueSchedule, Tree>::CollectiveOp;
using Mainloop = typename ::cutlass::gemm::collective::CollectiveBuilder<
    ::cutlass::arch::Sm90, ::cutlass::arch::OpClassTensorOp, M, RowMajor, alignment, M, LayoutB, alignment,
    float, Tile, Cluster,
    ::cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename Epilogue::SharedStorage))>,
    Schedule>::CollectiveOp;
using Kernel = ::cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = ::cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

template <class Tree> typename Tree::Arguments tree_arguments(const Product& job) {
  if constexpr (std::is_same_v<Tree, Forward>)
    return {{{{}, {static_cast<const M*>(job.bias)}, {}}, {static_cast<M*>(job.aux), {job.columns, {}, {}}}},
            job.f};
  else return {{{}, {}, job.f}, {job.sums}};
}

cudaError_t launch(const Product& job, cudaStream_t stream) {
  const auto strides = [](auto stride, int64_t ld) {
    if constexpr (cute::is_static_v<std::remove_cvref_t<decltype(cute::get<1>(stride))>>)
      cute::get<0>(stride) = ld;
    else cute::get<1>(stride) = ld;
    return stride;
  };
  const auto dense = strides(typename Gemm::GemmKernel::StrideD{}, job.columns);
  ::cutlass::KernelHardwareInfo hardware;
  hardware.sm_count = ::cutlass::KernelHardwareInfo::query_device_multiprocessor_count();
  typename Gemm::Arguments arguments{
      ::cutlass::gemm::GemmUniversalMode::kGemm,
      {static_cast<int>(job.rows), static_cast<int>(job.columns), static_cast<int>(job.depth), 1},
      {static_cast<const M*>(job.a), strides(typename Gemm::GemmKernel::StrideA{}, job.lda),
       static_cast<const M*>(job.b), strides(typename Gemm::GemmKernel::StrideB{}, job.ldb)},
      {tree_arguments<Tree>(job), nullptr, {}, static_cast<M*>(job.d), dense},
      hardware};
  if constexpr (!is_forward) {
    arguments.epilogue.ptr_C = static_cast<const M*>(job.aux);
    arguments.epilogue.dC = dense;
  }
  if (Gemm::can_implement(arguments) != ::cutlass::Status::kSuccess ||
      Gemm::get_workspace_size(arguments) != 0)
    return cudaErrorInvalidValue;
  Gemm gemm;
  if (gemm.run(arguments, nullptr, stream) != ::cutlass::Status::kSuccess) {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? cudaErrorLaunchFailure : error;
  }
  return cudaGetLastError();
}

}  // namespace
}  // namespace mlpext::MLPEXT_ISA

namespace mlpext::cuda::ct {
constinit const Launch MLPEXT_LAUNCH = MLPEXT_ISA::launch;
}
