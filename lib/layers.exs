# The modules of Bombus in their order: each may use those above it, never those below.
# test/bombus/layers_test.exs reads the sources and fails where one does not.
[
  # What is said: errors, and options as tables
  Bombus.Error,
  Bombus.Native.Library,
  Bombus.Native,
  Bombus.Handle,
  Bombus.Hub.Token,
  Bombus.Options.Spec,
  Bombus.Options.Unknown,
  Bombus.Options,

  # Tensors and their files
  Bombus.Device,
  Bombus.Tensor,
  Bombus.Safetensors,
  Bombus.Quantization,

  # Where things come from
  Bombus.Hub.Options,
  Bombus.Hub.Progress,
  Bombus.Hub.Cache,
  Bombus.Hub,
  Bombus.Source,

  # What is loaded, and the front door that loads it
  Bombus.OrderedJSON,
  Bombus.Tokenizer.Messages,
  Bombus.Tokenizer,
  Bombus.Adapter,
  Bombus.Model.Options,
  Bombus.Model,
  Bombus.Model.Info,
  Bombus.Telemetry,
  Bombus.Embedding,
  Bombus.Reranking,
  Bombus,

  # A request
  Bombus.Serving.Format,
  Bombus.Serving.Options,
  Bombus.Serving.Input,
  Bombus.Serving.Deadline,
  Bombus.Serving.Fault,
  Bombus.Serving.Peer,
  Bombus.Serving.Requests,
  Bombus.Serving.Request,

  # A named serving, on this node or another
  Bombus.Serving.Loader,
  Bombus.Serving.Server,
  Bombus.Serving.Client,
  Bombus.Serving.Remote,

  # Servings
  Bombus.Serving.Batch,
  Bombus.Serving.Chunks,
  Bombus.Serving,
  Bombus.Text,
  Bombus.Application,

  # Training
  Bombus.Training.LoRA.Folder,
  Bombus.Training.LoRA.Events,
  Bombus.Training.LoRA.Curve,
  Bombus.Training.LoRA.Monitor,
  Bombus.Training.LoRA.Progress,
  Bombus.Training.LoRA.Rates,
  Bombus.Training.LoRA.Run,
  Bombus.Training.LoRA.Options,
  Bombus.Training.LoRA.Row,
  Bombus.Training.LoRA.Data,
  Bombus.Training.LoRA.Jsonl,
  Bombus.Training.LoRA,

  # Commands
  Mix.Bombus.CommandLine,
  Mix.Bombus.Terminal,
  Mix.Bombus.Generation,
  Mix.Bombus.ModelInfo,
  Mix.Bombus.Conversation,
  Mix.Tasks.Bombus.Download,
  Mix.Tasks.Bombus.Generate,
  Mix.Tasks.Bombus.Info,
  Mix.Tasks.Bombus.Chat,
  Mix.Tasks.Bombus.Train,
  Mix.Tasks.Compile.BombusNative
]
