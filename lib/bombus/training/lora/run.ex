defmodule Bombus.Training.LoRA.Run do
  @moduledoc false
  # One training: the process that owns Python. It goes when its caller goes, and Python goes with
  # it: the pipe to it closes, however the VM ends.

  require Logger

  alias Bombus.Error
  alias Bombus.Training.LoRA.{Curve, Events, Folder}

  @doc "Runs Python to its end; `on_event` is called here, in the caller."
  def run(python, settings, on_event) do
    caller = self()
    ref = make_ref()
    {pid, monitor} = spawn_monitor(fn -> own(caller, ref, python, settings) end)

    try do
      await(ref, monitor, on_event)
    after
      stop(pid)
      Process.demonitor(monitor, [:flush])
    end
  end

  @doc "Stops the training that writes to `path`, and returns when Python has gone."
  def cancel(path) do
    case :global.whereis_name(Folder.name(path)) do
      :undefined -> Error.error(:not_found, "no training of this node writes to `#{path}`")
      pid -> stop(pid)
    end
  end

  defp stop(pid) do
    monitor = Process.monitor(pid)
    send(pid, :cancel)
    receive do: ({:DOWN, ^monitor, :process, _pid, _reason} -> :ok)
  end

  defp await(ref, monitor, on_event) do
    receive do
      {^ref, {:event, event}} ->
        on_event.(event)
        await(ref, monitor, on_event)

      {^ref, {:end, result}} ->
        result

      {:DOWN, ^monitor, :process, _pid, reason} ->
        Error.error(:training_failed, "the training's process ended: #{inspect(reason)}")
    end
  end

  defp own(caller, ref, python, settings) do
    path = settings.adapter_path

    with :yes <- :global.register_name(Folder.name(path), self()),
         :ok <- Folder.free(path, settings.overwrite, settings.resume_adapter_file),
         :ok <- Folder.begin(path),
         {:ok, file} <- Events.create(path, settings.done) do
      Process.flag(:trap_exit, true)
      port = open(python, settings)
      # None where Python has ended already; its exit status comes as a message.
      os_pid = with {:os_pid, os_pid} <- Port.info(port, :os_pid), do: os_pid

      state = %{
        caller: caller,
        monitor: Process.monitor(caller),
        ref: ref,
        port: port,
        os_pid: os_pid,
        file: file,
        path: path,
        begun?: false,
        words: [],
        warnings: [],
        last: nil
      }

      event(state, %{type: :start, os_pid: os_pid, iterations: settings.iters + settings.done})
      {result, state} = loop(state)
      Events.finish(file, result, Enum.reverse(state.warnings))
      if state.begun?, do: Curve.draw(path, Folder.events(path)), else: Folder.failed(path)
      send(caller, {ref, {:end, result}})
    else
      :no -> send(caller, {ref, {:end, busy(path)}})
      {:error, %Error{} = error} -> send(caller, {ref, {:end, {:error, error}}})
      {:error, reason} -> send(caller, {ref, {:end, io(path, reason)}})
    end
  end

  defp busy(path), do: Error.error(:busy, "another training writes to `#{path}`")

  defp io(path, reason) do
    kind = if reason in [:enospc, :edquot], do: :disk_full, else: :io
    Error.error(kind, "cannot write to `#{path}`: #{:file.format_error(reason)}")
  end

  defp open(python, settings) do
    script = Application.app_dir(:bombus, "priv/python/train_lora.py")

    port =
      Port.open({:spawn_executable, python}, [
        :binary,
        :exit_status,
        :hide,
        :stderr_to_stdout,
        {:line, 65_536},
        args: ["-u", script],
        # Its log is no terminal, whatever this one is.
        env: [
          {~c"TERM", ~c"dumb"},
          {~c"NO_COLOR", ~c"1"},
          {~c"FORCE_COLOR", false},
          {~c"CLICOLOR_FORCE", false}
        ]
      ])

    settings =
      settings
      |> Map.delete(:overwrite)
      |> Map.put(:log, Folder.starting_log(settings.adapter_path))

    # As a message: a command to a port that is closed would raise.
    send(port, {self(), {:command, [JSON.encode_to_iodata!(settings), ?\n]}})
    port
  end

  # -> how it ended, and the state then
  defp loop(%{port: port, monitor: monitor} = state) do
    receive do
      {^port, {:data, {_eol, line}}} -> state |> line(line) |> loop()
      {^port, {:exit_status, status}} -> {ended(state, status), state}
      {:EXIT, ^port, _reason} -> {ended(state, 1), state}
      :cancel -> {cancelled(state), state}
      {:DOWN, ^monitor, :process, _pid, _reason} -> {cancelled(state), state}
    end
  end

  defp line(state, line) do
    case Events.decode(line) do
      {:ok, %{type: :done}} -> %{state | last: :done}
      {:ok, %{type: :error} = error} -> %{state | last: error}
      {:ok, %{type: :begun}} -> begun(state)
      {:ok, %{type: :warning} = warning} -> warned(state, warning.message)
      {:ok, event} -> event(state, event)
      # What Python says before it can write to its log.
      :error -> %{state | words: Enum.take([line | state.words], 20)}
    end
  end

  defp begun(state) do
    Folder.begun(state.path)
    %{state | begun?: true}
  end

  defp warned(state, message) do
    Logger.warning("the training of `#{state.path}`: #{message}")
    %{state | warnings: [message | state.warnings]}
  end

  defp event(state, event) do
    Events.append(state.file, event)
    send(state.caller, {state.ref, {:event, event}})
    state
  end

  defp ended(%{last: :done} = state, 0), do: {:ok, state.path}

  defp ended(%{last: %{kind: kind, message: message} = error}, _status) do
    case {reason(kind, message), error[:module]} do
      {:training_failed, _module} -> Error.error(:training_failed, "#{kind}: #{message}")
      {reason, nil} -> Error.error(reason, message)
      {reason, module} -> Error.error(reason, "Python has no #{module}: #{install()}")
    end
  end

  defp ended(state, status) do
    reason = if status > 128, do: :training_killed, else: :training_failed
    signal = if status > 128, do: " (signal #{status - 128})", else: ""
    Error.error(reason, "Python ended with status #{status}#{signal}\n#{last_words(state)}")
  end

  @doc "How Python gets what a training needs."
  def install do
    mlx = if match?({:unix, :darwin}, :os.type()), do: "mlx", else: "\"mlx[cpu]\""
    "python3 -m pip install #{mlx} mlx-lm (with the Python that :python names)"
  end

  defp reason("ModuleNotFoundError", _message), do: :mlx_lm_missing
  defp reason("NoNumber", _message), do: :loss_is_nan
  defp reason("BadData", _message), do: :bad_training_data
  defp reason("BadOption", _message), do: :bad_request
  defp reason("DiskFull", _message), do: :disk_full
  defp reason("MemoryError", _message), do: :out_of_memory

  defp reason(kind, _message) when kind in ["FileNotFoundError", "RepositoryNotFoundError"],
    do: :not_found

  defp reason(_kind, message) do
    if message =~ ~r/out of memory|Unable to allocate|malloc/i,
      do: :out_of_memory,
      else: :training_failed
  end

  defp last_words(state) do
    {:ok, logged} = Folder.logged(state.path, state.begun?)
    words = Enum.reverse(state.words) ++ String.split(logged, "\n")
    words |> Enum.reject(&(String.trim(&1) == "")) |> Enum.take(-6) |> Enum.join("\n")
  end

  defp cancelled(state) do
    Port.close(state.port)
    gone(state.os_pid, 30)
    Error.error(:cancelled, "the training was cancelled")
  end

  # Python ends when its pipe closes; a moment later, not when it feels like it.
  defp gone(os_pid, 0), do: System.cmd("kill", ["-KILL", "#{os_pid}"], stderr_to_stdout: true)

  defp gone(os_pid, tries) do
    if Events.alive?(os_pid) do
      Process.sleep(100)
      gone(os_pid, tries - 1)
    end
  end
end
