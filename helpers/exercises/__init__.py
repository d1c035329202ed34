"""Checks for the exercises: a learner passes an answer and reads whether it is right and, if not, why.

    def mean_cosine(gradients, vector, mask): ...
    exercises.check_cosine(mean_cosine)

    exercises.check_sign()     # asks a question with four options
    exercises.check_sign("a")  # answers it

A check of code runs the answer on random tensors, compares it with the book's definition, and recognises the
usual mistakes. Each check prints a sentence that begins with "Right" or "Not yet"; it never shows the solution.
One file a chapter; what they share is in `checking.py`.
"""

from helpers.exercises.gradient_filtering import (
    check_crossing,
    check_equal_size,
    check_fihs,
    check_hiding,
    check_safety_score,
    check_sign,
)
from helpers.exercises.inoculation import (
    check_better_placebo,
    check_difference_of_differences,
    check_hidden_trait,
    check_loss_difference,
    check_participation_ratio,
    check_placebo_interpretation,
    check_response_loss,
)
from helpers.exercises.preventative_steering import (
    check_cosine,
    check_first_component_share,
    check_other_trait,
    check_persona_vector,
    check_pressure,
    check_projection_edit,
    check_random_control,
    check_random_panel,
    check_steering_hook,
)
from helpers.exercises.primer import (
    check_five_seeds,
    check_high_score,
    check_logit_lens,
    check_predicting,
    check_slope,
    check_turning_point,
    check_undecided,
)
from helpers.exercises.prompt_only_steering import (
    check_ends,
    check_fair_comparison,
    check_feature_step,
    check_hidden_steering,
    check_nothing_steers,
    check_overall,
)
from helpers.exercises.refusal_redistribution import (
    check_ablation,
    check_attacker,
    check_covariance_loss,
    check_high_k,
    check_k_star,
    check_micro_batch,
)
from helpers.exercises.weight_steering import (
    check_alpha_for_ratio,
    check_dose,
    check_pile_mean,
    check_project_on_diff,
    check_steering_sign,
    check_unlearnt,
)

__all__ = [
    "check_ablation",
    "check_alpha_for_ratio",
    "check_attacker",
    "check_better_placebo",
    "check_cosine",
    "check_covariance_loss",
    "check_crossing",
    "check_difference_of_differences",
    "check_dose",
    "check_ends",
    "check_equal_size",
    "check_fair_comparison",
    "check_feature_step",
    "check_fihs",
    "check_first_component_share",
    "check_five_seeds",
    "check_hidden_steering",
    "check_hidden_trait",
    "check_hiding",
    "check_high_k",
    "check_high_score",
    "check_k_star",
    "check_logit_lens",
    "check_loss_difference",
    "check_micro_batch",
    "check_nothing_steers",
    "check_other_trait",
    "check_overall",
    "check_participation_ratio",
    "check_persona_vector",
    "check_pile_mean",
    "check_placebo_interpretation",
    "check_predicting",
    "check_pressure",
    "check_project_on_diff",
    "check_projection_edit",
    "check_random_control",
    "check_random_panel",
    "check_response_loss",
    "check_safety_score",
    "check_sign",
    "check_slope",
    "check_steering_hook",
    "check_steering_sign",
    "check_turning_point",
    "check_undecided",
    "check_unlearnt",
]
