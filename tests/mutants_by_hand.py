"""The mutants for `mutants.py`: name, file of the package, original text, replacement, and the
tests that should fail."""

REFERENCE = "test_results_and_gradients_equal_the_reference and (complete or sparse)"


def laws(which: str) -> str:
    """Tests of test_laws.py that match an expression."""
    return f'test_laws.py -k "{which}"'


def reference(which: str) -> str:
    """The comparison with the reference, for variants and engines that match an expression."""
    return laws(f"{REFERENCE} and ({which})")


def each_term(which: str) -> str:
    """The pass on the CPU against its dense form in float64."""
    return f'test_couple.py -k "test_each_term_equals_the_dense_form and dtype1 and ({which})"'


def unfolded(which: str) -> str:
    """Convolutions against the dense form that unfolds windows."""
    return f'test_convolution.py -k "unfolds and ({which})"'


ALONE = "test_a_sample_is_routed_alike_alone_and_in_a_batch"
DYNAMIC = "routing/dynamic.py"
EDGES = "routing/edges.py"
GRADIENTS = 'test_couple.py -k "test_a_gradient_that_alone_is_wanted_is_the_same"'
OPS = "kernels/ops.py"
PASSES = "kernels/cpu/couple_passes.py"
POSE_PASSES = "kernels/cpu/pose_passes.py"
TERMS = "kernels/triton/terms.py"
INTERPRETED = 'triton_numbers.py -k "test_a_pass_equals_the_dense_form_whatever_its_terms"'
COMPILED = 'test_triton.py -k "real_size and 90"'
NEEDED = ["of_u", "of_weight", "of_a", "of_k", "of_p", "of_q", "of_beta", "of_prior"]


def swapped(place: int) -> str:
    """`NEEDED` in code, with two neighbours swapped."""
    names = NEEDED[:place] + NEEDED[place : place + 2][::-1] + NEEDED[place + 2 :]
    return f"needed = [{', '.join(names)}]"


MUTANTS = [
    # losses and images
    (
        "no clamp on the present term",
        "nets/losses.py",
        "(present - lengths).clamp(min=0)",
        "(present - lengths)",
        "test_losses.py",
    ),
    (
        "no clamp on the absent term",
        "nets/losses.py",
        "(lengths - absent).clamp(min=0)",
        "(lengths - absent)",
        "test_losses.py",
    ),
    (
        "invisible pixels count as light",
        "data/images.py",
        "np.asarray(alpha) > 0",
        "np.asarray(alpha) >= 0",
        "test_images.py -k not_visible",
    ),
    # what is kept
    (
        "a graph that changed is not prepared anew",
        "structure.py",
        "if seen is None or not all(map(_same, seen.content, content)):",
        "if seen is None:",
        "test_kept_graphs.py",
    ),
    (
        "features are kept, not copies of them",
        "structure.py",
        "[x if x is None else x.clone() for x in content]",
        "content",
        "test_kept_graphs.py",
    ),
    (
        "graphs are kept for good",
        "structure.py",
        "list(_seen)[:-GRAPHS_KEPT]",
        "[]",
        "test_kept_graphs.py",
    ),
    # threads
    (
        "OpenMP in a forked process",
        "kernels/cpu/threads.py",
        "None if _Process.forked else _openmp()",
        "_openmp()",
        "test_threads.py -k forked",
    ),
    (
        "a failed pass is not noticed",
        "kernels/cpu/threads.py",
        "if len(done) < len(calls):",
        "if False:",
        "test_threads.py -k exception_of_any",
    ),
    (
        "the state of an optimizer keeps its strides",
        "training/loop.py",
        "            _lay_out_like_parameters(self.optimizer)\n",
        "",
        "test_training.py -k strides",
    ),
    # dynamic routing
    (
        "gradients='last' ignored with votes",
        DYNAMIC,
        'last_alone = self.gradients == "last"',
        "last_alone = False",
        reference("last and scatter"),
    ),
    (
        "gradients='last' ignored by the layer's kernel",
        DYNAMIC,
        "route_dynamically(self.iterations, self.gradients)",
        "route_dynamically(self.iterations)",
        reference("last and fused"),
    ),
    (
        "gradients='last' ignored by the kernel on the CPU",
        "kernels/__init__.py",
        'iterations, gradients == "all"',
        "iterations, True",
        reference("last and fused"),
    ),
    (
        "gradients='last' ignored by the kernel on CUDA",
        "kernels/triton/dynamic.py",
        "through_all and len(s) > 1",
        "len(s) > 1",
        'triton_dynamic_numbers.py -k "last"',
    ),
    (
        "gradients='last' ignored with graph=, on engines with votes",
        "layers.py",
        "deque(self.routing.steps(edges),",
        "deque((self.routing if structure is self.structure"
        " else type(self.routing)(self.routing.iterations)).steps(edges),",
        laws("given_for_one_call and last and scatter"),
    ),
    (
        "gradients='last' ignored with graph=, by the kernel",
        "layers.py",
        "v = self.routing.by_kernel(edges)",
        "v = (self.routing if structure is self.structure"
        " else type(self.routing)(self.routing.iterations)).by_kernel(edges)",
        laws("given_for_one_call and last and fused"),
    ),
    (
        "the coupling of the last iteration has a gradient",
        EDGES,
        "c.detach() if detach_coupling else c",
        "c",
        reference("last and scatter"),
    ),
    (
        "votes detached keep their gradient",
        EDGES,
        "self.u_hat.detach()",
        "self.u_hat",
        "test_routing_of_ones_own.py -k detached",
    ),
    (
        "poses detached keep their gradient",
        EDGES,
        "self.u.detach()",
        "self.u",
        "test_routing_of_ones_own.py -k detached",
    ),
    (
        "matrices detached keep their gradient",
        EDGES,
        "self.weight.detach()",
        "self.weight",
        "test_routing_of_ones_own.py -k detached",
    ),
    (
        "logits of all iterations are the last agreement",
        DYNAMIC,
        "V is None or not self.accumulate",
        "True",
        reference("dynamic"),
    ),
    # the pass with votes
    (
        "softmax over children, by DGL",
        "passing/many_edges.py",
        'norm_by="src"',
        'norm_by="dst"',
        reference("dynamic and builtin"),
    ),
    (
        "softmax over children, by scatter",
        "passing/scatter.py",
        "competing = self.by_competition",
        "competing = self.by_parent",
        reference("dynamic and scatter"),
    ),
    (
        "logits averaged over the batch",
        EDGES,
        "b = sum(terms[1:], terms[0])",
        "b = sum(terms[1:], terms[0]); b = b.view(self.samples, -1, 1).mean(0)"
        ".repeat(self.samples, 1)",
        laws(f"{ALONE} and scatter"),
    ),
    (
        "scatter's greatest logit is at least 0",
        "passing/scatter.py",
        "include_self=leak",
        "include_self=True",
        laws("added_to_all_logits and scatter"),
    ),
    (
        "the leak is ignored by engines with votes",
        EDGES,
        "softmax_over_parents(b, leak)",
        "softmax_over_parents(b)",
        reference("options and scatter"),
    ),
    (
        "the leak of equal logits is ignored with votes",
        EDGES,
        "(rivals + int(leak))",
        "rivals",
        reference("options and scatter"),
    ),
    (
        "the leak is ignored by fused",
        EDGES,
        "            leak=leak,\n",
        "",
        reference("options and fused"),
    ),
    (
        "the leak takes no share of many edges, by DGL",
        "passing/many_edges.py",
        "total = total + by_sample[:, edges:]",
        "total = total",
        laws("sizes_of_one_odd and 131 and options and builtin"),
    ),
    (
        "beta is added before the softmax",
        EDGES,
        "        terms = []\n",
        "        terms = [] if beta is None else [self._of_kind(beta)]\n        beta = None\n",
        reference("self_attention and scatter"),
    ),
    (
        "the prior is dropped with votes",
        EDGES,
        "terms.append(self._of_kind(prior))",
        "terms.append(0 * self._of_kind(prior))",
        reference("self_routing and scatter"),
    ),
    (
        "the prior is dropped by fused",
        EDGES,
        "prior=None if prior is None else prior.to(self.u)",
        "prior=None",
        reference("self_routing and fused"),
    ),
    (
        "the total is over the parents of all graphs",
        EDGES,
        'self._structure.numbers("graph_of_parent", x.device)',
        "torch.zeros(self.parents, dtype=torch.int64)",
        laws("of_different_sizes and variational and scatter"),
    ),
    (
        "parents have no type",
        EDGES,
        'x.index_select(0, self._structure.numbers("parent_type", x.device))',
        "x.repeat(self.parents, *[1] * (x.dim() - 1))[: self.parents]",
        "test_routing_of_ones_own.py -k type",
    ),
    (
        "DGL updates no parents",
        "passing/udf.py",
        'return tuple(made[name] for name in made if name.startswith("new "))',
        "return features",
        reference("dynamic and udf"),
    ),
    (
        "equal coupling counts a rival too many",
        "structure.py",
        "return sizes[self.competition].to(device)",
        "return (sizes[self.competition] + 1).to(device)",
        reference("uniform and scatter"),
    ),
    (
        "a degree is one too high",
        "structure.py",
        'self._most_rivals("amax").to(device)',
        'self._most_rivals("amax").add(1).to(device)',
        reference("self_attention and scatter"),
    ),
    # convolutions and who competes
    (
        "competition is ignored by scatter",
        "passing/scatter.py",
        "competing = self.by_competition",
        "competing = self.by_child",
        unfolded("window and scatter"),
    ),
    (
        "competition is ignored by DGL",
        "passing/many_edges.py",
        "self.competing = graph if structure.by_child else",
        "self.competing = graph if True else",
        unfolded("window and builtin"),
    ),
    (
        "competition is ignored by fused",
        "kernels/cpu/parts.py",
        "    if competition is not None:\n        edges, cuts",
        "    if False:\n        edges, cuts",
        unfolded("window and fused and dynamic"),
    ),
    (
        "matrices are numbered by the column first",
        "convolution.py",
        "(dy * kernel_size + dx)",
        "(dx * kernel_size + dy)",
        unfolded("strided and image and scatter and dynamic"),
    ),
    (
        "padding moves the grid of the parents the wrong way",
        "convolution.py",
        "top, left = y + padding - dy, x + padding - dx",
        "top, left = y - padding - dy, x - padding - dx",
        unfolded("padded and image and scatter and dynamic"),
    ),
    (
        "a window competes with that of the next row",
        "convolution.py",
        "competing = child * (rows * columns) + window",
        "competing = child * rows + window // columns",
        unfolded("strided and window and scatter and dynamic"),
    ),
    (
        "graphs of a batch compete",
        "graph.py",
        "graph_of_child[child.long()] * most + index",
        "0 * graph_of_child[child.long()] * most + index",
        'test_convolution.py -k "of_a_batch_do_not_compete"',
    ),
    (
        "the column of a coordinate is its row",
        "convolution.py",
        "torch.cartesian_prod(y, x)",
        "torch.cartesian_prod(x, y)",
        'test_convolution.py -k "coordinates"',
    ),
    (
        "a coordinate is added to the first number of a row",
        "votes.py",
        "torch.eye(1, dim).flip(1)",
        "torch.eye(1, dim)",
        'test_convolution.py -k "coordinates"',
    ),
    # Gaussians
    (
        "em without activations",
        "routing/em.py",
        "r=r, a=edges.a, squares=True",
        "r=r, squares=True",
        reference("em and scatter"),
    ),
    (
        "variational Bayes without activations",
        "routing/variational_bayes.py",
        "r=r, a=edges.a, squares=True",
        "r=r, squares=True",
        reference("variational and scatter"),
    ),
    (
        "self-routing without activations",
        "routing/self_routing.py",
        "prior=self.prior, a=edges.a",
        "prior=self.prior",
        reference("self_routing and scatter"),
    ),
    (
        "em's exponent is twice too large",
        "routing/em.py",
        "-0.5 / variance",
        "-1 / variance",
        reference("em and scatter"),
    ),
    (
        "em's normalisation is squared",
        "routing/em.py",
        "keepdim=True) / 2\n            # logsigmoid",
        "keepdim=True)\n            # logsigmoid",
        reference("em and scatter"),
    ),
    (
        "em's parents are all as active",
        "routing/em.py",
        "F.logsigmoid(logit) + log_normal",
        "log_normal",
        reference("em and scatter"),
    ),
    (
        "first variances are about 0",
        "routing/gaussians.py",
        "return sums.S / sums.N.clamp_min(SMALLEST_MASS)",
        "return torch.zeros_like(sums.S)",
        laws("keep_their_digits and scatter"),
    ),
    (
        "later variances of em are about the first mean",
        "routing/em.py",
        "log_normal, -0.5 / variance, mu",
        "log_normal, -0.5 / variance, r",
        reference("em and scatter"),
    ),
    # dtypes, devices, what is kept
    (
        "16 bits are computed in 16 bits",
        "layers.py",
        "torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype",
        "dtype",
        laws("16_bit and scatter"),
    ),
    (
        "autocast reaches the routing",
        "layers.py",
        "with _without_autocast(u.device.type):",
        "if True:",
        "test_layers.py -k autocast",
    ),
    (
        "a graph is copied on the default device",
        "structure.py",
        "        with made_to_be_kept():\n            self.graph, wanted",
        "        if True:\n            self.graph, wanted",
        "test_layers.py -k 'meta or inference'",
    ),
    (
        "what is kept of a graph is made on the default device",
        "structure.py",
        "    with made_to_be_kept():\n        return",
        "    if True:\n        return",
        "test_tracing.py test_torch_func.py",
    ),
    # traces and transforms
    (
        "the mapped dimension is not appended to the samples",
        "kernels/transforms.py",
        "x.movedim(0, dim).flatten(dim, dim + 1)",
        "x.movedim(0, dim + 1).flatten(dim, dim + 1)",
        "test_torch_func.py",
    ),
    (
        "samples share the gradients of matrices under vmap",
        "kernels/transforms.py",
        "if sharing or any(",
        "if any(",
        "test_torch_func.py",
    ),
    (
        "a copied layer prepares nothing",
        "layers.py",
        "of a copy, or of what was pickled\n        self._prepare()",
        "of a copy, or of what was pickled",
        "test_tracing.py -k copied",
    ),
    (
        "a moved layer prepares nothing",
        "layers.py",
        "super()._apply(fn, recurse)\n        self._prepare()",
        "super()._apply(fn, recurse)",
        "test_tracing.py -k moved",
    ),
    (
        "labels are looked at in a trace",
        "functional.py",
        " and not is_traced(labels)",
        "",
        "test_tracing.py -k checks_of_values",
    ),
    (
        "numpy holds the callers' storage",
        "kernels/cpu/parts.py",
        "torch.from_dlpack(x.detach().contiguous().resolve_neg()).numpy()",
        "x.detach().contiguous().resolve_neg().numpy()",
        "test_layers.py -k looking_for_nan",
    ),
    (
        "DGL computes in traces",
        "_dgl.py",
        "if is_traced():",
        "if False:",
        "test_torch_func.py -k say_that",
    ),
    (
        "the coupling is not detached",
        PASSES,
        "with_rivals and not detach_coupling",
        "with_rivals",
        "test_couple.py -k test_sums_and_all_gradients",
    ),
    (
        "nobody looks for NaN",
        "layers.py",
        "        _check_finite(poses, u)\n",
        "",
        "test_layers.py -k not_finite",
    ),
    *(
        (
            f"operations are kept without their {left_out} in the key",
            "passing/__init__.py",
            "key = (engine, samples, device)",
            f"key = ({kept})",
            "test_layers.py -k 'kept_for_each'",
        )
        for left_out, kept in (
            ("engine", "samples, device"),
            ("batch size", "engine, device"),
            ("device", "engine, samples"),
        )
    ),
    *(
        (
            f"kept without its device: {key}",
            file,
            f"keep(({key}, {device})",
            f"keep(({key},)",
            "test_layers.py -k kept_for_each",
        )
        for file, key, device in (
            ("structure.py", '"groups", by', "device"),
            ("structure.py", "name", "device"),
            ("structure.py", '"degree"', "device"),
            (EDGES, '"sorted"', "device"),
        )
    ),
    # long sums
    (
        "no partial sums",
        "structure.py",
        "if largest <= TERMS:",
        "if True:",
        laws("float32_errs_no_more and 20000 and scatter or 100000 and scatter"),
    ),
    (
        "no partial sums of children, by fused",
        "kernels/cpu/steps.py",
        "return max(TERMS, int(math.sqrt(count)))",
        "return max(TERMS, count)",
        'test_couple.py -k "float32_errs_no_more and 20000"',
    ),
    (
        "no partial sums of parents, by fused",
        "kernels/cpu/parts.py",
        "np.maximum(TERMS, np.sqrt(count))",
        "np.maximum(TERMS, count)",
        'test_couple.py -k "long_sum or float32_errs_no_more and 20000"',
    ),
    (
        "the exponential without its last term",
        "kernels/cpu/vectors.py",
        "for n in range(8)]",
        "for n in range(7)]",
        "test_dynamic_cpu.py -k exponential",
    ),
    # gradients of the pass
    *(
        (
            f"{NEEDED[place]} and {NEEDED[place + 1]} are asked for in each other's place",
            OPS,
            swapped(len(NEEDED)),
            swapped(place),
            GRADIENTS,
        )
        for place in range(len(NEEDED) - 1)
    ),
    (
        "the gradient of k is not made for that of r",
        OPS,
        "of_k = of_k or (of_r and p is not None)",
        "of_k = of_k",
        GRADIENTS,
    ),
    (
        "the gradient of p is not made for that of r",
        OPS,
        "of_p = of_p or (of_r and q is not None)",
        "of_p = of_p",
        GRADIENTS,
    ),
    ("dr without N", OPS, "dr = -N.unsqueeze(-1) * dS", "dr = 0 * dS", each_term("r")),
    ("dr without Q", OPS, "dr - 2 * dQ * S if", "dr if", each_term("everything")),
    ("dr without k", OPS, "dr - p * dk.unsqueeze(-1) if", "dr if", each_term("r and p")),
    ("dr without p", OPS, "dr - 2 * q * dp if", "dr if", each_term("r and q")),
    # the pass on the CPU
    (
        "fused: the softmax is not divided by its sum",
        "kernels/cpu/steps.py",
        "    invert(rows, TOTAL, lanes)\n",
        "",
        each_term("everything"),
    ),
    (
        "fused: no k",
        PASSES,
        "copy(b, e, inputs.k, j, 1, lanes)",
        "fill(b, e, b.dtype.type(0), 1, lanes)",
        each_term("k"),
    ),
    (
        "fused: no prior",
        PASSES,
        "add_number(b, e, inputs.prior[m], lanes)",
        "pass",
        each_term("prior"),
    ),
    ("fused: no beta", PASSES, "add_number(c, e, beta[m], lanes)", "pass", each_term("beta")),
    (
        "fused: equal logits without the leak",
        PASSES,
        "fill(c, FIRST, c.dtype.type(1 / (degree + leak)), degree, lanes)",
        "fill(c, FIRST, c.dtype.type(1 / degree), degree, lanes)",
        each_term("leak"),
    ),
    (
        "fused: gradients of logits without a",
        PASSES,
        "        multiply(g, e, rows, ACTIVATION, lanes)\n\n\n@inlined\ndef _vote",
        "        pass\n\n\n@inlined\ndef _vote",
        each_term("everything"),
    ),
    (
        "fused: gradients of votes without q",
        PASSES,
        "add_slopes(dy, FIRST, g, e, inputs.q, j * pose, y, e * pose, pose, lanes)",
        "pass",
        each_term("q"),
    ),
    # the same with poses in lanes
    (
        "poses in lanes: a gradient of a logit without the child's activation",
        POSE_PASSES,
        "put(g, e, get(g, e) * get(a, e))",
        "put(g, e, get(g, e))",
        each_term("poses and (EM or everything)"),
    ),
    (
        "poses in lanes: the pose of the child before",
        POSE_PASSES,
        "                        lay_pose(u, (nodes + i) * K, sizes, scratch.x, width)\n"
        "                    vote(",
        "                        pass\n                    vote(",
        unfolded("fused and dynamic and map"),
    ),
    (
        "poses in lanes: an odd number of a pose is left out",
        "kernels/cpu/pose_steps.py",
        "        if K % 2:",
        "        if False:",
        each_term("poses and p"),
    ),
    (
        "poses in lanes: what was not added yet is lost",
        POSE_PASSES,
        "        add_rest(totals, sums, sample * J, samples, J, width)\n\n\n@entry\n"
        "def couple_gradient_pass",
        "\n\n@entry\ndef couple_gradient_pass",
        each_term("poses and p"),
    ),
    (
        "poses in lanes: a leak is ignored",
        "kernels/cpu/pose_steps.py",
        "        total += get(rows, PART * LANE)",
        "        total += 0 * get(rows, PART * LANE)",
        each_term("poses and leak"),
    ),
    # Triton
    (
        "triton: offsets of samples in 32 bits",
        TERMS,
        "first = tl.cast(number, tl.int64) * run.size.BLOCK_B",
        "first = tl.cast(number, tl.int32) * run.size.BLOCK_B",
        COMPILED,
    ),
    (
        "triton: offsets of matrices in 32 bits",
        TERMS,
        "(tl.cast(kind, tl.int64) * run.size.K + k)",
        "(kind * run.size.K + k)",
        COMPILED,
    ),
    (
        "triton: offsets of iterations and parts in 32 bits",
        TERMS,
        "number = tl.cast(number, tl.int64) * run.inputs.B",
        "number = number * run.inputs.B",
        COMPILED,
    ),
    (
        "triton: coupling above 1",
        TERMS,
        "tl.exp(tl.minimum(above, 0.0))",
        "tl.exp(above)",
        "triton_numbers.py -k lifts_over",
    ),
    (
        "triton: TensorFloat-32",
        TERMS,
        'input_precision="ieee"',
        'input_precision="tf32"',
        COMPILED,
    ),
    (
        "triton: a kernel on the current device",
        "kernels/triton/device.py",
        "with torch.cuda.device_of(like):",
        "if True:",
        "test_triton.py -k launched_on_the_device",
    ),
    (
        "triton: one long sum",
        TERMS,
        "return tl.maximum(root, tl.cdiv(32, terms))",
        "return tl.maximum(root, 1 << 20)",
        'triton_numbers.py -k "lose_no_digits or loses_no_digits"',
    ),
    (
        "triton: no prior",
        TERMS,
        "b += tl.load(run.inputs.prior + edge.kind).to(tl.float32)",
        "b += 0.0",
        INTERPRETED,
    ),
]
