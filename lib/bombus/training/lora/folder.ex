defmodule Bombus.Training.LoRA.Folder do
  @moduledoc false
  # The folder that a training writes to. Until Python has loaded model and data, events and log have
  # names of their own: a start that fails leaves what was there.

  alias Bombus.Error

  @events "training.jsonl"
  @log "training.log"
  @starting %{@events => ".training.jsonl", @log => ".training.log"}
  @checkpoint ~r/^\d{7}_adapters\.safetensors$/
  @adapters ["adapters.safetensors", "adapter_model.safetensors"]

  def events(path), do: Path.join(path, @events)
  def starting_events(path), do: Path.join(path, @starting[@events])
  def starting_log(path), do: Path.join(path, @starting[@log])

  @doc "Whether there is an adapter, or a checkpoint of one."
  def occupied?(path) do
    case File.ls(path) do
      {:ok, names} -> Enum.any?(names, &(&1 in @adapters or &1 =~ @checkpoint))
      {:error, _reason} -> false
    end
  end

  @doc "Whether a training may write there. `resumed` is the checkpoint that it goes on from."
  @spec free(Path.t(), boolean(), Path.t() | nil) :: :ok | {:error, Error.t()}
  def free(path, overwrite, resumed \\ nil) do
    if (overwrite or (resumed && Path.dirname(resumed) == path)) || not occupied?(path) do
      :ok
    else
      Error.error(
        :already_there,
        "there is an adapter in `#{path}`: give overwrite: true to train another in its place, " <>
          "resume_from: to go on with it, or another :output_path"
      )
    end
  end

  @doc "Makes the folder, and an empty log in it."
  def begin(path) do
    with :ok <- File.mkdir_p(path) do
      File.rm(starting_events(path))
      File.rm(starting_log(path))
      File.write(starting_log(path), "", [:exclusive])
    end
  end

  @doc "The training has begun: its events and its log take the place of an earlier one's."
  def begun(path) do
    for {name, starting} <- @starting,
        do: File.rename(Path.join(path, starting), Path.join(path, name))

    :ok
  end

  @doc "The start has failed. Its events and its log stay where there is no adapter."
  def failed(path) do
    if occupied?(path) do
      for {_name, starting} <- @starting, do: File.rm(Path.join(path, starting))
      :ok
    else
      begun(path)
    end
  end

  @doc "What Python has said in this training, whether it has begun or not."
  def logged(path, begun?) do
    log = if begun?, do: Path.join(path, @log), else: starting_log(path)
    with {:error, _reason} <- File.read(log), do: {:ok, ""}
  end

  @doc "Runs what precedes a training, which a monitor then knows to be coming."
  def starting(path, fun) do
    registered = :global.register_name(starting_name(path), self())

    try do
      fun.()
    after
      if registered == :yes, do: :global.unregister_name(starting_name(path))
    end
  end

  @doc "Whether a training of this node is about to begin there, or has begun."
  def training?(path) do
    Enum.any?([starting_name(path), name(path)], &(:global.whereis_name(&1) != :undefined))
  end

  @doc "The name of the process that trains there."
  def name(path), do: {__MODULE__, node(), path}
  defp starting_name(path), do: {__MODULE__, :starting, node(), path}
end
