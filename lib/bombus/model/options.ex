defmodule Bombus.Model.Options do
  @moduledoc false
  # The options of Bombus.load_model/2, and the limits that a serving may have too.

  alias Bombus.{Device, Hub}

  @bits %{int2: 2, int3: 3, int4: 4, int5: 5, int6: 6, int8: 8}
  @most 0x7FFFFFFF
  @bytes 0x7FFFFFFFFFFF

  @limits [
    max_batch_size: [
      type: {:integer, 1..@most},
      by_default: "32",
      doc: "how many sequences run together"
    ],
    max_queue: [
      type: {:integer, 1..@most},
      by_default: "1024",
      doc: """
      how many more requests may wait; beyond that they are answered
      with `{:error, %Bombus.Error{reason: :overloaded}}`
      """
    ],
    prefill_chunk: [
      type: {:integer, 1..@most},
      by_default:
        "64 on `:cpu`, which is no slower there than more, 2048 on an NVIDIA card, else 512",
      doc: """
      how many prompt tokens go into one step, beside a token of every sequence that is being
      generated. Others wait so long for each piece of a long prompt
      """
    ]
  ]

  @own [
    max_context: [
      type: {:integer, 1..@most},
      by_default: "what the model was made for, which is the most",
      doc: "how many tokens a sequence may have, prompt and all"
    ],
    prefix_cache: [
      type: {:integer, 0..@bytes},
      by_default: "1 GiB",
      doc: """
      how many bytes of keys and values of finished sequences are kept, 0 for none. A request that
      begins with the same tokens and has the same adapter computes only the rest: the next turn of a
      conversation, or the same instructions for another visitor. What was used longest ago is dropped
      first
      """
    ]
  ]

  @quantization [
    threads: [
      type: {:integer, 1..1024},
      by_default: "the physical cores",
      doc: """
      how many threads work on a step, on `:cpu`. All models share one pool, and take turns at it step
      by step
      """
    ],
    quantization: [
      type: {:custom, {__MODULE__, :check_quantization}},
      type_spec: quote(do: Bombus.Model.quantization()),
      by_default: "as the checkpoint is",
      doc: """
      `:int2` to `:int6`, `:int8`, or `[bits: 4, group_size: 64]` (64 is the default group). A dense
      checkpoint is quantized while it is loaded, as `mlx_lm.convert` does it: layer by layer,
      through a file in the system's folder for temporary files, where there must be room for the
      result. One that is quantized already must agree, or the answer is
      `{:error, %Bombus.Error{reason: :quantization_mismatch}}`
      """
    ]
  ]

  # Bumblebee's, which mean nothing here.
  @refused [
    type: "weights keep the types of the checkpoint; quantization: :int4 quantizes a dense one",
    preserve_source_types: "weights keep the types of the checkpoint",
    module: "config.json says which model it is",
    architecture: "config.json says which model it is, and Bombus generates text",
    spec: "config.json describes the model",
    spec_overrides: "config.json describes the model",
    params_filename:
      "model*.safetensors is read; a folder with the files you want is {:local, path}",
    params_variant:
      "model*.safetensors is read; a folder with the files you want is {:local, path}",
    log_params_diff: "a tensor that is missing or does not fit is an error that names it"
  ]

  @doc "The limits of a model that a serving may narrow for its own requests."
  def limits, do: @limits

  def schema do
    Device.schema() ++
      @quantization ++
      @limits ++
      @own ++
      [on_progress: Hub.Options.on_progress()] ++
      for({key, why} <- @refused, do: {key, [type: {:refused, why}]})
  end

  @doc false
  # -> the bits, and the group size where that is given
  def check_quantization(name) when is_map_key(@bits, name), do: {:ok, %{bits: @bits[name]}}

  def check_quantization(options) do
    with true <- Keyword.keyword?(options),
         [] <- Keyword.keys(options) -- [:bits, :group_size],
         %{bits: bits} = wanted when bits in [2, 3, 4, 5, 6, 8] <- Map.new(options),
         true <- Map.get(wanted, :group_size, 64) in [32, 64, 128] do
      {:ok, wanted}
    else
      _other ->
        {:error,
         "one of #{inspect(Map.keys(@bits))}, or bits: (2 to 6, 8) and group_size: (32, 64, 128)"}
    end
  end

  @doc "What the NIF takes of checked options; what was not given is nil."
  def native(options) do
    wanted = options[:quantization]

    %{
      device: Device.native(options),
      threads: options[:threads],
      quantization: wanted && {wanted.bits, wanted[:group_size] || 64},
      limits: native_limits(options)
    }
  end

  @doc "The limits of a model or a serving, all of them."
  def native_limits(options) do
    keys = Keyword.keys(@limits ++ @own)
    Map.new(keys, &{&1, options[&1]})
  end
end
