"""One-step image generators: networks, training methods, samplers and the training step. Needs torch and safetensors alone.

registration        `@register`: methods and networks by name
part_docs           settings of a part as documentation
plugins             modules outside the packages that register parts
networks            interface of networks; diffusion transformer with two times (DiT), and its named sizes
objectives          training methods, one file each
samplers            ODE, solution-function and diffusion samplers; noise of a sample by its index
sampling_networks   networks as sampling runs them: bfloat16, CUDA graphs
paths               paths from data to noise, with derivatives
parameterization    the solution function in terms of the network
times               distributions of training times and the schedule of the middle time
schedule_shapes     shapes of schedules: constant, linear, cosine, exponential
guidance            classifier-free guidance inside training targets
labels              the label that stands for no class
rows                arithmetic between values per row and batches of images
passes              forward passes of an objective: precision, skipped rows, teacher
nfe                 number of network evaluations of training and sampling
optimizer           Adam settings and the learning rate as a function of the step
ema                 averages of the parameters; post-hoc reconstruction of power-function EMAs (EDM2)
augmentation        geometric augmentation of images, with the labels that a network is given
dropout             seed of a network's dropout in a training step
alignment           a term that aligns hidden tokens with features of the clean image (REPA's idea)
step_checks         checks of what a training step is made of
train_step          one optimizer step of any objective, and its state
update              what clipping, optimizer and averages do once the gradients are there
recorded_passes     the passes of a step as a CUDA graph
recorded_update     its update as another one
gradient_sync       averages gradients over ranks: DDP, one all-reduce, FSDP
sharding            FSDP2: a network whose parameters are split over ranks
rank_check          compares tensors of all ranks bit for bit
host_copy           copies of nested states in host memory
kernels             TF32 and deterministic kernels within a step
weights             weights files: safetensors with a header
initial_weights     weights of one network as the start of another; official SiT and DiT checkpoints
published           checkpoints of published code: official SoFlow, α-Flow, MeanFlow in PyTorch, SiT
published_unet      official SoFlow's checkpoints of the U-Net
settings            checks and (de)serialization of settings dataclasses
failures            errors about input, and one-line summaries of exceptions
"""

# A registry looks for plugins where it is asked for a name that it does not know.
import soflow_core.plugins  # noqa: F401
