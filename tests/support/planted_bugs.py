"""Bugs that people make in normalization layers, for tests of `check`.

`BUGS` has for each name the layer, and the property whose report names the bug.
"""

from tests.support import planted_gradients as gradients
from tests.support import planted_state as state
from tests.support import planted_values as values

STATE = {
    "grad_mode_for_training": (state.GradModeForTraining, "mode"),
    "eval_uses_batch": (state.EvalUsesBatch, "samples_in_evaluation"),
    "training_uses_running": (state.TrainingUsesRunning, "gradient_in_training"),
    "mode_of_construction": (state.ModeOfConstruction, "evaluation_changes_nothing"),
    "eval_uses_last_batch": (state.EvalUsesLastBatch, "newest_batch_weight"),
    "train_returns_none": (state.TrainReturnsNone, "accepts_input"),
    "eval_resets_statistics": (state.EvalResetsStatistics, "switching_modes"),
    "train_is_ignored": (state.TrainIsIgnored, "same_output_in_evaluation"),
    "biased_running_var": (state.BiasedRunningVar, "same_running_statistics"),
    "unbiased_normalization": (state.UnbiasedNormalization, "normalization"),
    "inverted_momentum": (state.InvertedMomentum, "newest_batch_weight"),
    "ignored_momentum": (state.IgnoredMomentum, "momentum"),
    "never_updated": (state.NeverUpdated, "evaluation_matches_training"),
    "var_not_updated": (state.VarNotUpdated, "evaluation_matches_training"),
    "updated_in_eval": (state.UpdatedInEval, "evaluation_changes_nothing"),
    "updated_twice": (state.UpdatedTwice, "momentum"),
    "shared_by_class": (state.SharedByClass, "layers_share_nothing"),
    "count_of_first_batch": (state.CountOfFirstBatch, "same_running_statistics"),
    "samples_for_values": (state.SamplesForValues, "same_running_statistics"),
    "never_counts": (state.NeverCounts, "counter"),
    "counts_in_eval": (state.CountsInEval, "counter"),
    "graph_kept": (state.GraphKept, "no_graph_between_steps"),
    "not_buffers": (state.NotBuffers, "restored_layer_continues"),
    "not_saved": (state.NotSaved, "restored_layer_continues"),
    "statistics_are_parameters": (state.StatisticsAreParameters, "repeatable"),
    "wrong_cumulative_average": (state.WrongCumulativeAverage, "momentum_none"),
    "reset_forgets_count": (state.ResetForgetsCount, "reset_running_stats"),
    "reset_forgets_var": (state.ResetForgetsVar, "reset_running_stats"),
    "no_update_under_no_grad": (state.NoUpdateUnderNoGrad, "mode"),
    "update_under_no_grad_only": (state.UpdateUnderNoGradOnly, "mode"),
    "std_as_running_var": (state.StdAsRunningVar, "evaluation_matches_training"),
    "first_batch_by_python_counter": (state.FirstBatchByPythonCounter, "restored_layer_continues"),
    "lambda_attribute": (state.LambdaAttribute, "copies"),
    "closure_over_tensor": (state.ClosureOverTensor, "copies"),
    "derived_tensor_attribute": (state.DerivedTensorAttribute, "copies"),
    "load_drops_keys": (state.LoadDropsKeys, "restored_layer_continues"),
    "load_casts_to_float32": (state.LoadCastsToFloat32, "restored_layer_continues"),
    "saved_without_statistics": (state.SavedWithoutStatistics, "restored_layer_continues"),
    "lazy_gamma": (state.LazyGamma, "restored_layer_continues"),
    "cached_in_eval": (state.CachedInEval, "evaluation_matches_training"),
    "global_eps": (state.GlobalEps, "eps"),
    "statistics_by_id": (state.StatisticsById, "copies"),
    "not_converted": (state.NotConverted, "accepts_input"),
}

VALUES = {
    "gamma_ignored_in_eval": (values.GammaIgnoredInEval, "evaluation_matches_training"),
    "beta_before_gamma": (values.BetaBeforeGamma, "same_gradients_in_training"),
    "gamma_twice": (values.GammaTwice, "linear_parameters"),
    "gamma_along_width": (values.GammaAlongWidth, "accepts_input"),
    "gamma_without_gradient": (values.GammaWithoutGradient, "gradient_in_training"),
    "gamma_not_parameter": (values.GammaNotParameter, "device_move"),
    "batch_axis_only": (values.BatchAxisOnly, "evaluation_matches_training"),
    "width_missing": (values.WidthMissing, "normalization"),
    "samples_mixed": (values.SamplesMixed, "samples_in_evaluation"),
    "batch_size_of_first_call": (values.BatchSizeOfFirstCall, "several_batch_sizes"),
    "squeezed_batch_of_one": (values.SqueezedBatchOfOne, "one_sample"),
    "running_for_batch_of_one": (values.RunningForBatchOfOne, "one_sample"),
    "squares_minus_square": (values.SquaresMinusSquare, "large_mean"),
    "float16_sums": (values.Float16Sums, "float16"),
    "bfloat16_statistics": (values.Bfloat16Statistics, "float32"),
    "eps_outside_root": (values.EpsOutsideRoot, "normalization"),
    "eps_twice": (values.EpsTwice, "eps"),
    "eps_only_in_training": (values.EpsOnlyInTraining, "evaluation_matches_training"),
    "eps_ignored": (values.EpsIgnored, "eps"),
    "tutorial_layer_norm": (values.TutorialLayerNorm, "normalization"),
    "nan_gradient_of_std": (values.NanGradientOfStd, "constant_input"),
    "no_eps": (values.NoEps, "constant_input"),
    "eps_underflows": (values.EpsUnderflows, "constant_input"),
    "sum_for_mean": (values.SumForMean, "new_layer"),
    "autocast_mean": (values.AutocastMean, "mixed_precision"),
    "input_modified": (values.InputModified, "input_unchanged"),
    "memory_order": (values.MemoryOrder, "memory_layout"),
    "offset_ignored": (values.OffsetIgnored, "memory_layout"),
    "view_of_input": (values.ViewOfInput, "memory_layout"),
    "strides_of_input": (values.StridesOfInput, "memory_layout"),
    "returns_float32": (values.ReturnsFloat32, "bfloat16"),
    "float64_becomes_float32": (values.Float64BecomesFloat32, "dtype_conversion"),
    "made_on_cpu": (values.MadeOnCpu, "device_move"),
}

GRADIENTS = {
    "detached_mean": (gradients.DetachedMean, "gradient_in_training"),
    "detached_var": (gradients.DetachedVar, "gradient_in_training"),
    "no_grad_in_eval": (gradients.NoGradInEval, "gradient_in_evaluation"),
    "backward_without_gamma": (gradients.BackwardWithoutGamma, "gradient_in_training"),
    "backward_without_mean_term": (gradients.BackwardWithoutMeanTerm, "gradient_in_training"),
    "backward_of_training_in_eval": (gradients.BackwardOfTrainingInEval, "gradient_in_evaluation"),
    "backward_in_memory_order": (gradients.BackwardInMemoryOrder, "memory_layout"),
    "backward_views_gradient": (gradients.BackwardViewsGradient, "memory_layout"),
    "backward_modifies_gradient": (gradients.BackwardModifiesGradient, "input_unchanged"),
    "second_derivative_of_constants": (gradients.SecondDerivativeOfConstants, "second_derivative"),
    "unsaved_output": (gradients.UnsavedOutput, "inplace_operation_behind"),
    "saved_output": (gradients.SavedOutput, "inplace_operation_behind"),
    "output_is_view": (gradients.OutputIsView, "inplace_operation_behind"),
    "gamma_gradient_is_mean": (gradients.GammaGradientIsMean, "gradient_in_training"),
    "frozen_gamma_stops_gradient": (gradients.FrozenGammaStopsGradient, "frozen_parameters"),
    "mean_of_means": (gradients.MeanOfMeans, "synchronization"),
    "var_not_synchronized": (gradients.VarNotSynchronized, "synchronization"),
    "gradient_not_synchronized": (gradients.GradientNotSynchronized, "synchronization"),
    "local_running_statistics": (gradients.LocalRunningStatistics, "synchronization"),
    "empty_shard_waits": (gradients.EmptyShardWaits, "synchronization"),
    "python_counter": (gradients.PythonCounter, "restored_layer_continues"),
}

# What `check` does not count as a bug: a norm need not accept each number of dimensions, nor
# one value per channel in training; channels may be the last dimension, as in transformers; and a
# layer may look at values, although torch.compile then needs several graphs.
NO_BUGS = {
    "channels_last_dim": values.ChannelsLastDim,
    "fails_for_3_dims": values.FailsFor3Dims,
    "fails_for_5_dims": values.FailsFor5Dims,
    "nan_for_one_value": values.NanForOneValue,
    "branch_on_values": gradients.BranchOnValues,
}

BUGS = {**STATE, **VALUES, **GRADIENTS}
