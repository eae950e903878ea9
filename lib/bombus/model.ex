defmodule Bombus.Model do
  @moduledoc """
  A loaded model, made by `Bombus.load_model/2`.

    * `:name` - what its source is called: an id, or a folder
    * `:spec` - `%{family:, layers:, context:, hidden_size:, vocab_size:}`; `:context` is how many
      tokens a sequence may have, prompt and all
    * `:quantization` - `%{bits:, group_size:, mode:, overrides:}`, or `nil` for a dense checkpoint;
      `:overrides` maps module paths to `%{bits:, group_size:}`, or to `nil` where one is dense
    * `:device` - `:cpu`, `:gpu` or `{:mlx, :cpu}`
    * `:max_batch_size` - how many sequences run together
    * `:generation_config` - the repository's `generation_config.json`

  The struct is a handle. The weights live on the model's own thread, and are freed once no process
  holds the struct and nothing is being generated with it.
  """

  @type t :: %__MODULE__{
          name: String.t(),
          spec: map(),
          quantization: map() | nil,
          device: :cpu | :gpu | {:mlx, :cpu},
          max_batch_size: pos_integer(),
          generation_config: map(),
          ref: reference()
        }

  @derive {Inspect, only: [:name, :spec, :quantization, :device]}
  @enforce_keys [:ref, :name, :spec, :quantization, :device, :max_batch_size, :generation_config]
  defstruct @enforce_keys

  @doc false
  def from_native({ref, native}, name) do
    %__MODULE__{
      ref: ref,
      name: name,
      spec: Map.take(native, [:family, :layers, :context, :hidden_size, :vocab_size]),
      quantization: native.quantization && quantization(native.quantization),
      device: if(native.device == :mlx_cpu, do: {:mlx, :cpu}, else: native.device),
      max_batch_size: native.max_batch_size,
      generation_config: JSON.decode!(native.generation_config)
    }
  end

  defp quantization(quantization) do
    Map.update!(quantization, :overrides, fn overrides ->
      for {path, own} <- overrides, into: %{} do
        {path, with({bits, group_size} <- own, do: %{bits: bits, group_size: group_size})}
      end
    end)
  end
end
