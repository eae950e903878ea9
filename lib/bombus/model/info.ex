defmodule Bombus.Model.Info do
  @moduledoc false
  # What a model is, and whether it would load: from its configuration and the headers of its files,
  # without its weights. Of a model of the Hub only these are downloaded.

  alias Bombus.{Device, Error, Native, Options, Source}

  @schema Device.schema()

  @typedoc """
  What `read/2` says.

    * `:source` - an id, or a folder
    * `:family`, and `:language_model` where that holds another model
    * `:layers`, `:hidden_size`, `:vocab_size`, `:heads`, `:kv_heads`, `:head_dim`, `:context`
    * `:windows` - `{layers, positions}` for each size of window
    * `:rope` - `%{theta:, dim:, scaling:, factor:}`, `:unrotated` - the layers without
    * `:parameters`, and in `:parts` those of each role, with their layouts
    * `:disk` - bytes of the files of tensors, `:memory` - bytes of the weights, of keys and values of a
      position (`:kv_position`) and of a sequence as long as the context (`:kv_context`)
    * `:device`, and `:steps` - how it computes them: `{:own | :mlx | :fused, nil}`, or
      `{:layer_by_layer, why}`
    * `:tokenizer`, `:chat_template` - whether they are there
    * `:missing_files`, `:missing_tensors` - the first of them
    * `:warnings` - what of the configuration is not followed
    * `:problems` - why it would not load
  """
  @type t :: map()

  @doc "What a source's model is; an error where that cannot even be said."
  @spec read(Bombus.source(), keyword()) :: {:ok, t()} | {:error, Error.t()}
  def read(source, options \\ []) do
    device = options |> Options.validate!(@schema, "Bombus.Model.Info.read/2") |> Device.native()
    Source.check!(source)

    with {:ok, info} <- read_source(source, device),
         do: {:ok, info |> Map.put(:source, Source.name(source)) |> from_native()}
  end

  defp read_source({:hf, id}, device), do: read_source({:hf, id, []}, device)

  defp read_source({:hf, id, _options} = source, device) do
    with {:ok, folder} <- Source.resolve(source, :outline) do
      try do
        folder |> read_folder(device) |> named(folder, id)
      after
        File.rm_rf!(folder)
      end
    end
  end

  defp read_source(source, device) do
    with {:ok, folder} <- Source.resolve(source, :model), do: read_folder(folder, device)
  end

  defp read_folder(folder, device), do: Native.await(&Native.model_info(folder, device, &1))

  # The folder is temporary: messages name what it is of.
  defp named({:ok, info}, folder, id) do
    named = &String.replace(&1, folder, id)
    problems = for {reason, message} <- info.problems, do: {reason, named.(message)}
    {:ok, %{info | problems: problems, warnings: Enum.map(info.warnings, named)}}
  end

  defp named({:error, %Error{message: message} = error}, folder, id),
    do: {:error, %{error | message: String.replace(message, folder, id)}}

  defp from_native(info) do
    problems =
      for {reason, message} <- info.problems,
          do: %Error{reason: String.to_atom(reason), message: message}

    device = if(info.device == :mlx_cpu, do: {:mlx, :cpu}, else: info.device)
    %{info | problems: problems, device: device}
  end
end
