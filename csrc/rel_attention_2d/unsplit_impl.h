// What the kernels that split neither queries nor keys share; part of their kernels_impl.h.

enum class Bias { none, axes, table };

// choose<B, Dropout, Masks>() for a problem and whether some query must leave out some key of the grid.
template <class Choose>
FA_INLINE void with_options(const Problem& p, bool masks, const Choose& choose) {
  auto with_masks = [&]<Bias B, bool Dropout>() {
    return masks ? choose.template operator()<B, Dropout, true>() : choose.template operator()<B, Dropout, false>();
  };
  auto with_dropout = [&]<Bias B>() {
    return p.drop_below > 0 ? with_masks.template operator()<B, true>() : with_masks.template operator()<B, false>();
  };
  if (p.bias_table) return with_dropout.template operator()<Bias::table>();
  if (p.row_term || p.col_term) return with_dropout.template operator()<Bias::axes>();
  with_dropout.template operator()<Bias::none>();
}

// A (batch, heads, positions, depth) tensor as one of rows of one position.
FA_INLINE TensorView as_grid(const TensorView& prefix) {
  TensorView view = prefix;
  view.stride[4] = prefix.stride[3], view.stride[3] = 0;
  return view;
}
