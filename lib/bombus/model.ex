defmodule Bombus.Model do
  @moduledoc """
  A loaded model, made by `Bombus.load_model/2`.

    * `:name` - what its source is called: an id, or a folder
    * `:spec` - what it is: a map of
        * `:family` - the `model_type` of `config.json`: one of `Bombus.families/0`
        * `:layers`, `:hidden_size`, `:vocab_size` - its sizes
        * `:context` - how many tokens a sequence may have, prompt and all
        * `:fallback` - `nil`, or why steps go layer by layer on an NVIDIA card, which is slower than
          the one kernel that serves other models there
    * `:quantization` - `%{bits:, group_size:, mode:, overrides:}`, or `nil` for a dense checkpoint;
      `:overrides` maps module paths to `%{bits:, group_size:}`, or to `nil` where one is dense
    * `:device` - `:cpu`, `:gpu` or `{:mlx, :cpu}`
    * `:max_batch_size` - how many sequences run together
    * `:generation_config` - the repository's `generation_config.json`

  The struct is a handle. The weights belong to the model's own thread. They are freed when no process
  holds the struct any more and no request uses the model, or by `Bombus.unload/2`.
  """

  alias Bombus.Options

  @typedoc "A loaded model."
  @type t :: %__MODULE__{
          name: String.t(),
          spec: %{
            family: String.t(),
            layers: pos_integer(),
            context: pos_integer(),
            hidden_size: pos_integer(),
            vocab_size: pos_integer(),
            fallback: String.t() | nil
          },
          quantization:
            %{
              bits: 2..8,
              group_size: 32 | 64 | 128,
              mode: :affine,
              overrides: %{String.t() => %{bits: 2..8, group_size: 32 | 64 | 128} | nil}
            }
            | nil,
          device: :cpu | :gpu | {:mlx, :cpu},
          max_batch_size: pos_integer(),
          generation_config: %{String.t() => term()},
          ref: reference()
        }

  @typedoc "An option of `Bombus.load_model/2`."
  @type option :: unquote(Options.Spec.option(Bombus.Model.Options.schema()))

  @typedoc "How a dense checkpoint is quantized: the bits, in groups of 64 where nothing else is said."
  @type quantization ::
          :int2
          | :int3
          | :int4
          | :int5
          | :int6
          | :int8
          | [{:bits, 2..6 | 8} | {:group_size, 32 | 64 | 128}]

  @behaviour Bombus.Handle

  @derive {Inspect, only: [:name, :spec, :quantization, :device]}
  @enforce_keys [:ref, :name, :spec, :quantization, :device, :max_batch_size, :generation_config]
  defstruct @enforce_keys

  @doc false
  @impl Bombus.Handle
  def handle, do: {:model, "a model", "Bombus.load_model/2"}

  @doc false
  def from_native({ref, native}, name) do
    %__MODULE__{
      ref: ref,
      name: name,
      spec: Map.take(native, [:family, :layers, :context, :hidden_size, :vocab_size, :fallback]),
      quantization: native.quantization && quantization(native.quantization),
      device: if(native.device == :mlx_cpu, do: {:mlx, :cpu}, else: native.device),
      max_batch_size: native.max_batch_size,
      generation_config: JSON.decode!(native.generation_config)
    }
  end

  @doc false
  # What a load says in the log: what of the configuration is not followed, and what is slower by it.
  def warnings(%{warnings: warnings, fallback: nil}, _name), do: warnings

  def warnings(%{warnings: warnings, fallback: why}, name),
    do: warnings ++ ["the steps of `#{name}` go layer by layer, which is slower: #{why}"]

  @doc false
  # Raises where the ids are no token ids of the model.
  def token_ids!(%__MODULE__{spec: %{vocab_size: vocab_size}}, ids) do
    unless ids != [] and Options.proper_list?(ids) do
      raise ArgumentError, "expected a list of at least one token id, got: #{Options.show(ids)}"
    end

    case Enum.find(ids, :none, &(not (is_integer(&1) and &1 in 0..(vocab_size - 1)))) do
      :none ->
        ids

      wrong ->
        raise ArgumentError,
              "expected token ids in 0..#{vocab_size - 1}, got: #{Options.show(wrong)}"
    end
  end

  defp quantization(quantization) do
    Map.update!(quantization, :overrides, fn overrides ->
      for {path, own} <- overrides, into: %{} do
        {path, with({bits, group_size} <- own, do: %{bits: bits, group_size: group_size})}
      end
    end)
  end
end
