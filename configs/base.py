"""Every field once, with its published default and source; presets only override.

Where a line names no other source, the default is that of Di[M]O on ImageNet-256: the paper
(arXiv:2503.15457) and its released configuration, with the MaskGIT teacher of arXiv:2310.14400.
Where the two differ the release is followed, and the line says so. `seed`, `mesh`, `log`,
`evaluation`, `health` and `precision` are ours. "update" means fake-score update unless a field
says generator update.
"""

from ml_collections import ConfigDict


def _optimizer(**fields) -> ConfigDict:
  """One optimiser; see OptimizerSpec."""
  config = ConfigDict()
  config.name = "adam"  # "adam" or "adamw"
  config.learning_rate = 1e-5
  config.b1 = 0.9  # decay of Adam's mean
  config.b2 = 0.999  # decay of Adam's squares
  # Storage of Adam's mean: "float32" or "bfloat16". The squares stay float32: at b2 = 0.999 a
  # bfloat16 one would never fall again.
  config.mean_dtype = "float32"
  config.eps = 1e-8  # the release takes 1e-6 in its 16-bit runs; parameters here are float32
  config.weight_decay = 0.0  # "adamw" only
  config.clip_norm = 0.0  # global norm of the gradient; 0 is off
  config.schedule = "constant"  # after the warm-up: "constant" or "cosine"
  config.num_warmup = 100  # updates of linear warm-up from 0
  config.final_fraction = 1.0  # where a cosine ends, as a fraction of learning_rate
  config.update(fields)
  return config


def get_config() -> ConfigDict:
  """The defaults."""
  config = ConfigDict()
  config.seed = 0  # of parameters, data order and every draw
  config.objective = "dimo"  # a key of OBJECTIVES

  config.data = data = ConfigDict()
  data.name = "labels"  # a key of SOURCES, or "labels": classes only, no images
  # File or folder of a source that reads one; "prepared": what `python -m dimo_jax.data.prepare`
  # wrote; "tfds": data_dir, "" its default.
  data.path = ""
  data.tfds_name = ""  # "tfds": the data set, such as "imagenet2012" or "imagenet_resized/64x64"
  # Pixels a side; 0: all have one size. "folder" and "tfds" scale and crop to it, "prepared" must
  # have it.
  data.image_size = 0
  data.pairs = ""  # noise-image pairs made by --mode=pairs, for dmd2.regression_weight
  # Codes of the training images that `python -m dimo_jax.encode` wrote, for a teacher to be trained
  # on; "" encodes the images of every batch.
  data.tokens = ""
  data.flip = False  # mirror training images at random (DMD2 on ImageNet-64 does)
  # Threads that read ahead, each a whole batch. Small images in memory are read under the
  # interpreter's lock, where more than one only wait for each other; files to decode want several.
  data.num_read_threads = 1
  data.num_classes = 1000  # ImageNet's; the null class is one more

  config.tokenizer = tokenizer = ConfigDict()
  tokenizer.name = "none"  # a key of TOKENIZERS; "none" trains on tokens without pictures
  # "vqgan": its weights, a last.ckpt or .safetensors with the published key names, a folder with
  # last.ckpt, either in gs://... or hf://owner/repo/file, or "random". A model.yaml beside it must
  # agree.
  tokenizer.path = ""
  tokenizer.patch_size = 16  # pixels along a token's side
  tokenizer.grid_size = 16  # tokens along the image's side
  tokenizer.codebook_size = 1024  # codes; the mask token is one more
  # "vqgan": its sizes; the defaults are those of taming-transformers' ImageNet model (f = 16).
  tokenizer.channels = 128  # at full resolution
  tokenizer.channel_mult = (1, 1, 2, 2, 4)  # times this at each resolution
  tokenizer.num_res_blocks = 2  # residual blocks at each of them; one more in the decoder
  tokenizer.attn_resolutions = (16,)  # where there is attention, besides the middle
  tokenizer.z_channels = 256  # between encoder or decoder and the codes
  tokenizer.code_dim = 256  # length of a code

  config.model = model = ConfigDict()  # generator, fake score and teacher alike
  model.hidden_dim = 768  # width
  model.num_layers = 24  # transformer blocks
  model.num_heads = 16  # of attention; divides hidden_dim
  model.mlp_dim = 3072  # width of the hidden layer of each block
  model.dropout = 0.1  # the rate, where dropout is active (teacher.pretrain, dimo.dropout)
  # What a block keeps for its backward pass besides its inputs; the rest is computed again: "none"
  # keeps all, "full" nothing, and "dots_saveable", "dots_with_no_batch_dims_saveable" products.
  model.remat = "none"
  model.scan_layers = True  # one compiled block run num_layers times: compile time constant

  config.process = process = ConfigDict()  # of continuous teachers (teacher.name = "edm")
  process.name = "edm"  # a key of PROCESSES: "edm" or "variance_preserving"
  process.num_levels = 1000  # of the table of noise levels (DMD2)
  process.sigma_min = 0.002  # "edm": the table's ends and its curvature (EDM, DMD2)
  process.sigma_max = 80.0
  process.rho = 7.0
  process.sigma_data = 0.5  # "edm": standard deviation of the data (EDM)
  process.schedule = "scaled_linear"  # "variance_preserving": or "linear", "cosine" (SD 1.5)
  process.beta_start = 0.00085  # there (SD 1.5)
  process.beta_end = 0.012
  process.prediction = "epsilon"  # there: what the network predicts

  # The network of continuous teachers; the defaults are EDM's ImageNet-64 (ADM).
  config.denoiser = denoiser = ConfigDict()
  denoiser.name = "adm"  # a key of DENOISERS: "adm", "song" (DDPM++, NCSN++) or "mlp"
  denoiser.dropout = 0.1  # the rate, where dropout is active (teacher.pretrain.dropout)
  denoiser.augment_dim = 0  # length of the augmentation labels; 0 is none
  denoiser.model_channels = 192  # "adm", "song": channels at full resolution
  denoiser.channel_mult = (1, 2, 3, 4)  # there, times this at each resolution
  denoiser.channel_mult_emb = 4  # width of the embedding over model_channels
  denoiser.num_blocks = 3  # residual blocks at each resolution; "mlp": in all
  denoiser.attn_resolutions = (32, 16, 8)  # "adm", "song": where there is attention
  denoiser.channels_per_head = 64  # "adm": of that attention
  denoiser.embedding_type = "positional"  # "song": or "fourier" (NCSN++)
  denoiser.channel_mult_noise = 1  # "song": 2 for NCSN++
  denoiser.encoder_type = "standard"  # "song": "standard", "skip" or "residual" (NCSN++)
  denoiser.decoder_type = "standard"  # "song": "standard" or "skip"
  denoiser.resample_filter = (1, 1)  # "song": (1, 3, 3, 1) for NCSN++
  denoiser.hidden_dim = 256  # "mlp": width
  denoiser.remat = "none"  # "adm", "song": as model.remat

  config.precision = precision = ConfigDict()
  precision.compute_dtype = "float32"  # of activations: "float32" or "bfloat16"
  precision.teacher_dtype = "float32"  # of the frozen teacher's stored parameters

  config.mesh = mesh = ConfigDict()
  mesh.fsdp = 1  # devices that share one copy of the parameters; the rest is data parallel
  # (regex searched in a path such as generator/params/last_dense/kernel, dimension to split or
  # None); else the largest that divides.
  mesh.rules = ()

  config.teacher = teacher = ConfigDict()
  teacher.name = "maskgit"  # a key of TEACHERS
  # A trained teacher: a published file of PyTorch, EDM or safetensors, our own teacher.safetensors
  # or a folder with either, here, gs://... or hf://owner/repo/file[@revision]; "random" for random
  # weights; or "" to train one first.
  teacher.path = ""

  teacher.pretrain = pretrain = ConfigDict()
  pretrain.num_steps = 0  # updates; 0 here, since the published teacher is given
  pretrain.batch_size = 256  # samples over all devices
  pretrain.mask_schedule = "arccos"  # a key of MASK_SCHEDULES
  pretrain.mask_kind = "exact"  # "exact" counts, or "bernoulli" (MaskGIT v1)
  pretrain.loss_positions = "masked"  # "masked", or "all" (MaskGIT v1)
  pretrain.label_smoothing = 0.1  # weight of the uniform distribution in the target
  pretrain.noise_levels = "log_normal"  # "edm" teachers (EDM); or "table", uniform over the levels
  pretrain.noise_mean = -1.2  # of ln sigma (EDM)
  pretrain.noise_std = 1.2
  pretrain.condition_drop_rate = 0.1  # share of null classes, for guidance
  pretrain.dropout = True  # at the rate model.dropout
  pretrain.ema_decay = 0.9999  # of the average, which becomes the teacher
  # MaskGIT v1: AdamW (0.9, 0.96), weight decay 1e-5, clip 1.
  pretrain.optim = _optimizer(
    name="adamw", learning_rate=1e-4, b2=0.96, weight_decay=1e-5, clip_norm=1.0
  )

  teacher.decoding = decoding = ConfigDict()  # MaskGIT decoding for evaluation and pictures
  decoding.num_steps = 12  # of the pictures; evaluation has its own list
  decoding.schedule = "arccos"  # "root", "linear", "square", "cosine", "arccos" or "uniform"
  decoding.order = "confidence"  # "confidence", "random", "warm_up", "greedy" or "halton"
  decoding.order_temperature = 4.5  # of the Gumbel noise on the confidence
  decoding.temperature = 1.0  # of the drawn tokens
  decoding.top_k = 0  # outputs kept; 0 is off
  decoding.top_p = 0.0  # probability kept; 0 is off
  decoding.allow_mask_token = True  # as released: a drawn mask id is clamped to the last code
  decoding.guidance_scale = 4.0  # 1 is none; the release's w = 3 ends its ramp at w + 1
  decoding.guidance_ramp = True  # linear from 1 over the steps
  decoding.halton_roll = False  # "halton": random offset per sample
  decoding.rewrite_revealed = False  # "halton": as the original; for teachers trained on all tokens

  teacher.sampling = heun = ConfigDict()  # Heun sampling of "edm" teachers (EDM, algorithm 2)
  heun.num_steps = 18  # of the pictures; evaluation has its own list
  heun.sigma_min = 0.002
  heun.sigma_max = 80.0
  heun.rho = 7.0
  heun.s_churn = 0.0  # fresh noise; 0 is deterministic; EDM's ImageNet-64: 40 with 256 steps
  heun.s_min = 0.0  # levels between which it is added; there 0.05 and 50
  heun.s_max = 1e6
  heun.s_noise = 1.0  # its standard deviation; there 1.003
  heun.guidance_scale = 1.0  # 1 is none

  config.dimo = dimo = ConfigDict()  # Di[M]O
  dimo.r_init = 0.6  # share of initial tokens that are masked; 1 collapses, near 0 is unstable
  dimo.r_init_high = 0.0  # above r_init: one ratio an update, uniform on [r_init, r_init_high]
  dimo.sigma_schedule = "fixed"  # or a warm-up from 0 to 1: "linear", "exponential", "cosine"
  dimo.sigma = 0.1  # embedding perturbation where the schedule is "fixed"; 0 is off
  dimo.sigma_num_warmup = 10_000  # updates, the scale of the warm-ups
  dimo.divergence = "jeffreys"  # a key of DIVERGENCES
  dimo.jeffreys_beta = 0.0  # 0 is forward KL, 1 reverse; the paper's best is -0.2
  dimo.weighting = "none"  # as released; "teacher_gap" is the paper's optional weight
  dimo.reduction = "sum"  # of the loss over tokens and outputs: "sum" (over batch size) or "mean"
  dimo.matching_weight = 1.0  # factor of the generator's loss
  dimo.mask_schedule = "arccos"  # of the generator's samples in its own loss
  dimo.fake_mask_schedule = "arccos"  # in the fake score's loss
  dimo.teacher_guidance = 2.0  # scale in training; 1 is none
  dimo.adaptive_guidance = False  # scale 1 + (teacher_guidance - 1) * mask ratio
  dimo.fake_guidance = 1.0  # of the fake score, where it is compared with the teacher
  dimo.fake_train_guidance = 1.0  # of the fake score in its own loss
  dimo.fake_condition_drop = 0.1  # there, dropped conditions; only with guidance in its loss
  dimo.generator_temperature = 1.0  # of the tokens drawn in training
  dimo.teacher_temperature = 1.0  # of the target distribution
  dimo.fake_temperature = 1.0  # of the fake distribution
  dimo.top_k = 0  # filters on the tokens drawn in training; 0 is off
  dimo.top_p = 0.0  # probability kept; 0 is off
  dimo.allow_mask_token = False  # True as released: a generator may emit the mask id
  dimo.label_smoothing = 0.1  # of the fake score's loss (in the code, not in the paper)
  dimo.soft_target_weight = 0.0  # fake score: 0 hard tokens, 1 the generator's distribution
  dimo.soft_temperature = 1.0  # of that distribution
  dimo.fake_rounds = 1  # fake-score updates for each generator update
  dimo.reuse_samples = False  # the first of them learns from that update's samples: one pass less
  dimo.dropout = False  # True as released: dropout active in all three networks, the teacher too

  config.dmd2 = dmd2 = ConfigDict()  # DMD2 (arXiv:2405.14867); ImageNet-64 settings
  dmd2.student_sigmas = (80.0,)  # levels of the student's steps, falling; several start at the end
  dmd2.student_inputs = "simulated"  # of several steps; "real": noised data, the paper's ablation
  dmd2.matching_weight = 1.0  # of distribution matching; 0 leaves the GAN alone
  dmd2.min_level = 0.02  # of the matching's noise, as fractions of the table
  dmd2.max_level = 0.98
  dmd2.teacher_guidance = 1.0  # SD 1.5: 1.75, SDXL: 8
  dmd2.fake_guidance = 1.0
  dmd2.gan_generator_weight = 3e-3  # 0 is off
  dmd2.gan_critic_weight = 1e-2  # 0 is no critic
  dmd2.gan_num_levels = 1000  # of the critic's noise; 0 shows it clean images
  dmd2.critic_features = "fake_score"  # whose bottleneck: or "teacher"
  dmd2.critic_groups = 32  # of its group norms
  dmd2.r1_weight = 0.0  # approximate R1; 100 to 1000 where it is on
  dmd2.r1_alpha = 0.1  # its perturbation
  dmd2.divergence = "reverse_kl"  # a key of F_DIVERGENCES (f-distill, arXiv:2502.15681)
  dmd2.ratio_normalization = True  # divide the density ratio by its mean at the noise level
  dmd2.ratio_rate = 0.0  # of that running mean; 0 is the batch's own; ImageNet-64: 0.5
  dmd2.regression_weight = 0.0  # on noise-image pairs of the teacher (DMD)
  dmd2.fake_rounds = 5  # fake-score updates for each generator update
  dmd2.reuse_samples = True  # the first of them learns from that update's samples, as released

  config.optim = optim = ConfigDict()
  optim.generator = _optimizer(clip_norm=1.0)
  optim.fake_score = _optimizer()
  # Regexes on parameters that neither generator nor fake score trains.
  optim.frozen = ("^token_embedding$", "^position_embedding$", "^output_bias$")

  config.train = train = ConfigDict()
  train.num_steps = 50_000  # generator updates
  # Workdir of an earlier distillation of the same teacher; its weights are where this one starts,
  # with fresh optimisers, averages, schedules and critic (DMD2's second stage); "" is the teacher.
  train.start_from = ""
  train.start_from_best = True  # its best evaluated checkpoint, else its last
  train.batch_size = 128  # samples of one micro-batch over all devices
  train.accumulation = 1  # micro-batches averaged into one update
  train.ema_decay = 0.9999  # the rate is min(ema_decay, (1 + k) / (10 + k)) at update k
  train.ema_every_steps = 1  # generator updates between two updates of the average
  train.ema_memory = "device"  # where averages (a teacher's too) lie: "device", or "host"

  # The ranges in which the preset was tried, by its authors or here; a line warns outside of them.
  # () is unknown.
  config.tested = tested = ConfigDict()
  tested.batch_size = (64, 128)  # samples of an update; 64 on each of 2 GPUs
  tested.learning_rate = (1e-5, 1e-5)  # of generator and fake score

  config.sampling = sampling = ConfigDict()  # one-step, at test time; r_init, sigma as trained
  sampling.guidance_scale = 1.0  # DMD2's student; 1 is none, as it is trained
  sampling.temperature = 1.0  # Di[M]O's: the release's FID-50k is best at 7, IS at lower ones
  sampling.top_k = 0  # outputs kept; 0 is off
  sampling.top_p = 0.0  # probability kept; 0 is off

  config.log = log = ConfigDict()
  log.every_steps = 50  # metrics and console
  log.pictures_every_steps = 1000  # grids of generator, teacher and fake score; 0 is off
  log.num_pictures = 40  # samples of each network in a grid
  log.evaluate_every_steps = 5000  # the one-step student; 0 is off
  log.checkpoint_every_steps = 1000  # and at every evaluation
  log.trackers = ()  # besides TensorBoard: "wandb", "mlflow"
  log.keep_checkpoints = 2  # the newest ones, besides the best evaluated one
  log.keep_every_steps = 0  # and for good those of its multiples; 0 is off
  log.profile_steps = ()  # (first, last) steps to record into profile/ of each stage; () is off

  config.evaluation = evaluation = ConfigDict()
  evaluation.protocol = "none"  # a key of PROTOCOLS or PUBLISHED, or "none"
  # Of PUBLISHED: Inception's weights and the .npz of statistics, here, gs://... or hf://...; off
  # where neither is given.
  evaluation.inception = ""
  evaluation.statistics = ""
  evaluation.num_images = 0  # there: another number, which every result tells; 0: the protocol's
  evaluation.teacher_first = True  # there: the teacher is evaluated before it is distilled
  evaluation.batch_size = 256  # samples a call
  evaluation.seed = 12345  # of the sampled images; published protocols have their own
  evaluation.teacher_steps = (1, 2, 4, 8, 16)  # at which the teacher is evaluated

  config.health = health = ConfigDict()  # what stops a run
  health.min_entropy = 1e-3  # nats per token of the generator, below which it has collapsed
  health.max_disagreement = 0.995  # total variation of teacher and fake score, above: diverged
  health.min_contrast = 0.02  # standard deviation of decoded pixels in [-1, 1], below: blank
  health.max_contrast = 2.0  # of DMD2's images before they are clipped; above: diverged
  health.max_brightness = 0.98  # |mean| of those pixels, above: all black or all white
  health.patience = 3  # readings in a row before the run stops; pictures stop it at the first
  # An update with anything NaN or infinite in it is left out; so many in a row, when the metrics
  # are next read, stop the run.
  health.max_skipped = 10

  config.lock()
  return config
