"""Faults in one step: what is covered, clipped and summed, who is drawn, and the noise."""

from __future__ import annotations

from mutants.mutant import Mutant

CLIPPING = "tests/privacy/test_clipping.py::"
ENGINES = "tests/privacy/test_engines.py::"
ENTROPY = "tests/privacy/test_entropy.py::"
HOLES = "tests/mutants/test_holes.py::"
NOISE = "tests/privacy/test_noise.py::"
PLAN = "tests/privacy/test_plan.py::"
PLANTED = "tests/faults/test_planted_faults.py::"
RESUMED = "tests/faults/test_resumed_runs.py::"
SAMPLING = "tests/privacy/test_sampling.py::"
STEP = "tests/trainers/test_dp_lora.py::"
TRIAL = "tests/guarantees/test_trial_proof.py::"

ROWS = f"{ENGINES}test_rows_per_unit_equal_plain_autograd_and_no_raw_gradient_is_left"
LOOP = f"{STEP}test_clipped_sums_equal_a_loop_over_single_patients"

COVERAGE = (
    Mutant(
        "head uncovered",
        "dpmed/privacy/flat.py",
        "named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]",
        'named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n]',
        "the classifier head is stepped with its raw gradient",
        (f"{LOOP}[clip-all-bert-classification]",),
        also=(
            (
                "if any(p.requires_grad for p in m.parameters(recurse=False))]",
                "if {id(p) for p in self.parameters} & {id(p) for p in m.parameters(recurse=False)}]",
            ),
        ),
    ),
    Mutant(
        "layers of unknown type accepted",
        "dpmed/privacy/flat.py",
        "known = type(module) in GradSampleHooks.GRAD_SAMPLERS and",
        "known = isinstance(module, torch.nn.Module) and",
        "a layer without a per-record rule is taken for covered",
        (f"{ENGINES}test_uncovered_parameters_are_named",),
    ),
    Mutant(
        "trial left out",
        "dpmed/trainers/dp_lora.py",
        "return prove(attach, self.model, of(self.frozen_head), truth=of(None), units=units)",
        "return attach()",
        "a model whose records influence each other is trained with a sensitivity that nobody knows",
        (
            f"{TRIAL}test_a_model_that_couples_records_is_refused_by_name_before_the_first_step[SharedCapacity-one_pass]",
        ),
    ),
    Mutant(
        "raw gradient let through",
        "dpmed/privacy/one_pass.py",
        "if p.grad is not None]",
        "if False]",
        "what a weight gets outside its own layer is neither clipped nor noised",
        (f"{ENGINES}test_a_weight_used_behind_its_layer_is_refused",),
    ),
)

CLIPPED_SUM = (
    Mutant(
        "mean loss for sum",
        "dpmed/privacy/one_pass.py",
        "losses.sum().backward()",
        "losses.mean().backward()",
        "each record's gradient depends on how many others are there",
        (f"{ROWS}[[3, 1, 2, 0, 5]-OnePassEngine]", f"{LOOP}[clip-some-llama-causal_lm]"),
    ),
    Mutant(
        "clipped sum divided by the records",
        "dpmed/trainers/dp_lora.py",
        "total = clipped if total is None else total.add_(clipped)",
        "clipped /= sum(map(len, group)); total = clipped if total is None else total.add_(clipped)",
        "noise calibrated to a sum is added to a mean",
        (f"{LOOP}[clip-all-llama-causal_lm]",),
    ),
    Mutant(
        "realised batch as divisor",
        "dpmed/trainers/dp_lora.py",
        "ranks.noised_sum_(total, self._noise).div_(self.plan.divisor)",
        "ranks.noised_sum_(total, self._noise).div_(max(1, len({e.unit for g in inputs for b in g for e in b})))",
        "the size of the draw shows in the update",
        (f"{STEP}test_the_divisor_is_the_expected_batch_and_not_the_draw",),
    ),
    Mutant(
        "loss divided by the batch's tokens",
        "dpmed/data/batches.py",
        "weights.sum(dim=1).clamp_min(",
        "weights.sum().clamp_min(",
        "a long record changes the gradient of all others",
        (f"{PLANTED}test_no_record_has_a_say_in_the_loss_of_another",),
    ),
    Mutant(
        "clip per record",
        "dpmed/trainers/dp_lora.py",
        "dict.fromkeys(e.unit for examples in group for e in examples)",
        "dict.fromkeys(id(e) for examples in group for e in examples)",
        "a patient of k records has sensitivity kC",
        (f"{LOOP}[clip-all-llama-causal_lm]",),
        also=(("[example.unit for example in examples]", "[id(example) for example in examples]"),),
    ),
    Mutant(
        "patient split over micro-batches",
        "dpmed/trainers/dp_lora.py",
        "units=[e.unit for e in examples],",
        "units=range(len(examples)),",
        "a patient in two micro-batches is clipped twice: sensitivity 2C",
        (
            f"{PLANTED}test_no_patient_is_clipped_twice_in_a_step",
            f"{STEP}test_the_sum_does_not_depend_on_the_micro_batches[llama]",
        ),
    ),
    Mutant(
        "norms in bfloat16",
        "dpmed/privacy/clipping.py",
        "norms = unit_norms(unit_gradients)  # [u]",
        "norms = unit_norms(unit_gradients.bfloat16()).float()",
        "rounded norms let a gradient be longer than C by parts in a hundred",
        (f"{CLIPPING}test_clipped_sum_equals_a_loop_over_units_whatever_the_rows_hold",),
    ),
    Mutant(
        "gradient buffer in bfloat16",
        "dpmed/privacy/one_pass.py",
        "self._width, device=device)",
        "self._width, device=device, dtype=torch.bfloat16)",
        "sums by patient are rounded before they are clipped",
        (f"{ENGINES}test_bfloat16_rows_become_float32[OnePassEngine]",),
    ),
    Mutant(
        "long norms in one go",
        "dpmed/privacy/clipping.py",
        "    whole = unit_gradients.shape[1] // _CHUNK * _CHUNK\n",
        "    return unit_gradients.norm(dim=1)\n    whole = unit_gradients.shape[1] // _CHUNK * _CHUNK\n",
        "float32 norms of millions of weights come out too small, so gradients stay longer than C",
        (f"{CLIPPING}test_norms_of_long_rows_are_right_to_a_millionth[3000001]",),
    ),
    Mutant(
        "non-finite unit kept",
        "dpmed/privacy/clipping.py",
        "    if not bool(finite.all()):",
        "    if False:",
        "one patient's NaN shows in all weights",
        (
            f"{CLIPPING}test_a_unit_that_is_not_finite_counts_as_absent_and_is_reported[nan]",
            f"{PLANTED}test_a_record_that_gives_nan_counts_as_zero_and_the_run_goes_on",
        ),
    ),
    Mutant(
        "records added to the wrong patient",
        "dpmed/privacy/one_pass.py",
        ".index_add_(0, self._positions, new.float())",
        ".index_add_(0, self._positions.flip(0), new.float())",
        "a patient's gradient is spread over other patients' rows",
        (f"{ROWS}[[4, 2, 4, 9, 2]-OnePassEngine]",),
    ),
    Mutant(
        "second use of a layer overwrites the first",
        "dpmed/privacy/one_pass.py",
        "        elif slot.written:\n            target.add_(new)",
        "        elif slot.written:\n            target.copy_(new)",
        "the row of a shared weight is not its gradient",
        (f"{ROWS}[[3, 1, 2, 0, 5]-OnePassEngine]",),
    ),
    Mutant(
        "rows of the previous micro-batch stay",
        "dpmed/privacy/one_pass.py",
        "(target if slot.written else target.zero_())",
        "target",
        "patients of one micro-batch are added to those of the next",
        (f"{ROWS}[[4, 2, 4, 9, 2]-OnePassEngine]",),
    ),
    Mutant(
        "record cap ignored",
        "dpmed/privacy/sampling.py",
        "if len(rows) <= self.max_records_per_unit:",
        "if len(rows):",
        "more of a patient's records are used than the certificate says",
        (
            f"{SAMPLING}test_a_drawn_unit_gives_distinct_records_uniformly_up_to_the_cap[6-2-fast]",
            f"{STEP}test_the_draws_come_from_the_plan_and_cap_the_windows_of_a_patient",
        ),
    ),
)

RANDOMNESS = (
    Mutant(
        "shuffled batches of fixed size",
        "dpmed/privacy/sampling.py",
        "drawn = self._held[self._uniforms(self._held.size) < self.sampling_rate]",
        "order = np.argsort(self._uniforms(self._held.size))\n"
        "        drawn = self._held[order[: round(self.sampling_rate * self._held.size)]]",
        "the accountant's amplification is that of Poisson draws",
        (
            f"{SAMPLING}test_draws_are_poisson_however_many_records_a_unit_has[0.1-fast]",
            f"{SAMPLING}test_the_size_of_a_draw_of_many_units_is_binomial[fast]",
        ),
    ),
    Mutant(
        "empty draw left out by the sampler",
        "dpmed/privacy/sampling.py",
        "            yield self.draw()",
        "            if rows := self.draw():\n                yield rows",
        "a step that is not there shows that nobody was drawn",
        (f"{SAMPLING}test_empty_draws_are_yielded_not_skipped[fast]",),
    ),
    Mutant(
        "empty draw skipped by the step",
        "dpmed/trainers/dp_lora.py",
        "        self._run.begin_step()\n",
        "        if not inputs:\n            return torch.zeros(())\n        self._run.begin_step()\n",
        "weights that stand still show that nobody was drawn",
        (f"{PLANTED}test_empty_draws_add_noise_step_and_are_charged",),
    ),
    Mutant(
        "no noise on an empty draw",
        "dpmed/trainers/dp_lora.py",
        "ranks.noised_sum_(total, self._noise).div_(self.plan.divisor)",
        "(ranks.noised_sum_(total, self._noise) if inputs else total).div_(self.plan.divisor)",
        "a gradient of zero shows that nobody was drawn",
        (f"{PLANTED}test_empty_draws_add_noise_step_and_are_charged",),
    ),
    Mutant(
        "noise per micro-batch",
        "dpmed/trainers/dp_lora.py",
        "total = clipped if total is None else total.add_(clipped)",
        "clipped = self._noise.add_(clipped); total = clipped if total is None else total.add_(clipped)",
        "the noise depends on the draw and is not what the accountant was told",
        (
            f"{PLANTED}test_noise_is_added_once_per_step_however_many_micro_batches",
            f"{PLANTED}test_the_noise_has_the_size_that_the_accountant_was_told[right]",
        ),
    ),
    Mutant(
        "noise without the clip norm",
        "dpmed/privacy/plan.py",
        "std = self.noise_multiplier * self.clip_norm if",
        "std = self.noise_multiplier if",
        "noise of the wrong size for every C but 1",
        (
            f"{PLAN}test_the_noise_has_the_clip_norm_in_it",
            f"{PLANTED}test_the_noise_has_the_size_that_the_accountant_was_told[right]",
        ),
    ),
    Mutant(
        "fixed noise seed by default",
        "dpmed/privacy/noise.py",
        "secrets.randbits(256) if seed is None else seed",
        "0 if seed is None else seed",
        "anyone can compute the noise and subtract it",
        (
            f"{NOISE}test_two_sources_differ[fast]",
            f"{PLAN}test_every_start_gets_fresh_noise_and_draws",
            f"{RESUMED}test_the_seed_of_the_run_does_not_fix_the_noise",
        ),
    ),
    Mutant(
        "fixed key in the secure path",
        "dpmed/privacy/entropy.py",
        "secrets.token_bytes(KEY_BYTES)",
        "bytes(KEY_BYTES)",
        "every request gets the same numbers",
        (
            f"{ENTROPY}test_every_request_gets_its_own_key_of_256_bits",
            f"{NOISE}test_no_secure_noise_repeats_over_draws_objects_forks_and_restarts",
        ),
    ),
    Mutant(
        "secure draws from the fast generator",
        "dpmed/privacy/sampling.py",
        "EntropyStream().uniforms if secure else _fast_uniforms(seed, rank)",
        "_fast_uniforms(seed, rank)",
        "who is in a draw can be told from earlier draws",
        (f"{SAMPLING}test_forks_of_a_secure_sampler_draw_afresh_and_those_of_a_fast_one_refuse",),
    ),
    Mutant(
        "secure noise not rounded",
        "dpmed/privacy/noise.py",
        ".div_(self.grid).round_().mul_(self.grid)",
        "",
        "the low bits of noised sums tell of the data",
        (f"{NOISE}test_secure_sums_lie_on_a_grid_that_does_not_depend_on_the_data[1.0]",),
    ),
    Mutant(
        "draws seeded by the run",
        "dpmed/trainers/dp_lora.py",
        "        return DataLoader(self.train_dataset, batch_sampler=sampler,",
        "        import numpy\n\n        sampler._uniforms = numpy.random.default_rng(self.args.seed).random\n"
        "        return DataLoader(self.train_dataset, batch_sampler=sampler,",
        "a resumed run replays its draws, and whoever knows the recipe knows who was drawn",
        (f"{HOLES}test_the_seed_of_the_run_does_not_fix_who_is_drawn",),
    ),
    Mutant(
        "every rank draws all patients",
        "dpmed/privacy/sampling.py",
        "self._held = np.arange(rank, self.n_units, world_size)",
        "self._held = np.arange(self.n_units)",
        "a patient is drawn by several ranks, at a higher rate and with a multiple of C",
        (f"{SAMPLING}test_each_rank_draws_its_own_units_only[fast]",),
    ),
    Mutant(
        "noise repeated in a fork",
        "dpmed/privacy/noise.py",
        "if self._seed is None and os.getpid() != self._process:",
        "if False:",
        "two processes add the same noise to different sums",
        (f"{NOISE}test_a_forked_fast_source_refuses_to_repeat_its_parent",),
    ),
    Mutant(
        "noise on every rank",
        "dpmed/privacy/ranks.py",
        "first = not several() or dist.get_rank() == 0",
        "first = True",
        "the sum of the ranks has other noise than the certificate says",
        (
            f"{HOLES}test_only_the_first_rank_adds_noise[fast]",
            f"{HOLES}test_only_the_first_rank_adds_noise[secure]",
        ),
    ),
)

FAULTS_OF_STEPS: tuple[Mutant, ...] = (*COVERAGE, *CLIPPED_SUM, *RANDOMNESS)
