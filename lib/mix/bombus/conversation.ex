defmodule Mix.Bombus.Conversation do
  @moduledoc false
  # A conversation in a terminal: lines come in, answers are written as they come, and lines that
  # begin with a slash are commands.

  alias Bombus.{Error, Options, Serving}
  alias Mix.Bombus.{Generation, Terminal}

  @commands [
    adapter: "NAME (or a folder, or a Hub id; `none`; without a name: which there are)",
    system: "TEXT: what the model is told first (without a text: nothing)",
    reset: "forgets the conversation",
    help: "this list",
    quit: "ends (so does Ctrl-D)"
  ]

  @enforce_keys [:serving, :model_word, :terminal?]
  defstruct [
              system: nil,
              adapter: nil,
              adapters: %{},
              messages: [],
              failed?: false,
              reader: nil
            ] ++ Enum.map(@enforce_keys, &{&1, nil})

  @doc """
  Talks until the input ends. `adapters` are loaded ones by name, `adapter` the name of the first.
  Returns whether all answers came.
  """
  def talk(%__MODULE__{} = state) do
    state = %{state | reader: spawn_link(&read/0)}
    state = Terminal.with_interrupts(fn -> turn(state) end)
    not state.failed?
  end

  defp turn(state) do
    if state.terminal?, do: IO.write(prompt(state))
    send(state.reader, {:read, self()})
    state |> line() |> then(&heard(&1, state))
  end

  defp prompt(%{adapter: nil}), do: "> "
  defp prompt(%{adapter: name}), do: "#{name}> "

  # What is typed is read by a process of its own, so that Ctrl-C is heard meanwhile.
  defp read do
    receive do
      {:read, pid} ->
        send(pid, {:line, IO.gets("")})
        read()
    end
  end

  # The terminal forgets the line at Ctrl-C, and the reader goes on waiting.
  defp line(state) do
    receive do
      {:line, line} ->
        line

      :interrupt ->
        IO.write("\n/quit or Ctrl-D ends the conversation\n" <> prompt(state))
        line(state)
    end
  end

  defp heard(:eof, state) do
    if state.terminal?, do: IO.puts("")
    state
  end

  defp heard({:error, _reason}, state) do
    problem("the input is no text in UTF-8")
    %{state | failed?: true}
  end

  defp heard(line, state) do
    case String.trim(line) do
      "" -> turn(state)
      "//" <> text -> state |> said("/" <> text) |> turn()
      "/" <> command -> command |> String.split(~r/\s+/, parts: 2) |> command(state)
      text -> state |> said(text) |> turn()
    end
  end

  defp command(["quit"], state), do: state
  defp command(["exit"], state), do: state

  defp command(["help"], state) do
    for {name, text} <- @commands, do: IO.puts(String.pad_trailing("/#{name}", 10) <> text)
    IO.puts("Ctrl-C stops an answer; a line that begins with // is a text with one slash.")
    turn(state)
  end

  defp command(["reset"], state), do: turn(%{state | messages: []})
  defp command(["system"], state), do: turn(%{state | system: nil})
  defp command(["system", text], state), do: turn(%{state | system: text})
  defp command(["adapter"], state), do: state |> list_adapters() |> turn()
  defp command(["adapter", "none"], state), do: turn(%{state | adapter: nil})
  defp command(["adapter", word], state), do: state |> take_adapter(String.trim(word)) |> turn()

  defp command([name | _text], state) do
    names = Keyword.keys(@commands)
    meant = if near = Options.Unknown.meant(name, names), do: ", did you mean /#{near}?", else: ""
    problem("unknown command /#{name}#{meant} (/help lists them)")
    turn(%{state | failed?: true})
  end

  defp list_adapters(state) do
    names = Enum.uniq(Map.keys(state.adapters) ++ Generation.demo_adapters(state.model_word))

    for name <- ["none" | Enum.sort(names)] do
      IO.puts(if(name == (state.adapter || "none"), do: "* ", else: "  ") <> name)
    end

    state
  end

  defp take_adapter(state, word) do
    source = Generation.adapter_source(word, state.model_word)

    with nil <- state.adapters[word],
         {:ok, adapter} <- load(source) do
      {name, _word} = Generation.named(word)
      %{state | adapter: name, adapters: Map.put(state.adapters, name, adapter)}
    else
      {:error, error} -> failed(state, error)
      _adapter -> %{state | adapter: word}
    end
  end

  defp load(source) do
    Bombus.load_adapter(source)
  rescue
    error in ArgumentError -> {:error, error}
  end

  # -> the state with the text and its answer
  defp said(state, text) do
    messages = state.messages ++ [%{role: "user", content: text}]
    system = if state.system, do: [%{role: "system", content: state.system}], else: []

    input = %{
      messages: system ++ messages,
      adapter: state.adapter && state.adapters[state.adapter],
      stream_done: true
    }

    case answer(state, input) do
      {:ok, answer} ->
        %{state | messages: messages ++ [%{role: "assistant", content: answer}]}

      {:error, error} ->
        failed(state, error)
    end
  end

  # The answer is written by a process of its own: to stop it ends the request.
  defp answer(%{serving: serving} = state, input) do
    me = self()

    {pid, monitor} =
      spawn_monitor(fn -> send(me, {:ended, self(), stream(serving, input, me)}) end)

    flush_interrupts()
    answer = listen(pid, monitor, state.terminal?, [])
    Process.demonitor(monitor, [:flush])
    answer
  end

  defp stream(serving, input, listener) do
    for chunk <- Serving.stream(serving, input), do: send(listener, {:chunk, self(), chunk})
    :ok
  rescue
    error in [Error, ArgumentError] -> {:error, error}
  end

  defp listen(pid, monitor, terminal?, texts) do
    receive do
      {:chunk, ^pid, {:done, %{results: [%{finish_reason: reason}]}}} ->
        if terminal? and reason == :length, do: IO.write(" [cut off: see --max-new-tokens]")
        listen(pid, monitor, terminal?, texts)

      {:chunk, ^pid, text} ->
        IO.write(text)
        listen(pid, monitor, terminal?, [texts | text])

      {:ended, ^pid, :ok} ->
        IO.puts("")
        {:ok, IO.iodata_to_binary(texts)}

      {:ended, ^pid, {:error, error}} ->
        {:error, error}

      {:DOWN, ^monitor, :process, _pid, reason} ->
        {:error, %RuntimeError{message: "the answer ended: #{inspect(reason)}"}}

      :interrupt ->
        stop(pid, monitor)
        IO.puts(" [stopped]")
        {:ok, IO.iodata_to_binary(texts)}
    end
  end

  defp stop(pid, monitor) do
    Process.exit(pid, :kill)
    receive do: ({:DOWN, ^monitor, :process, _pid, _reason} -> flush(pid))
  end

  defp flush(pid) do
    receive do
      {kind, ^pid, _rest} when kind in [:chunk, :ended] -> flush(pid)
    after
      0 -> :ok
    end
  end

  defp flush_interrupts do
    receive do
      :interrupt -> flush_interrupts()
    after
      0 -> :ok
    end
  end

  defp failed(state, %Error{reason: :prompt_too_long} = error) do
    problem(error.message <> " (/reset begins a new conversation)")
    %{state | failed?: true}
  end

  defp failed(state, error) do
    problem(Exception.message(error))
    %{state | failed?: true}
  end

  defp problem(message), do: Mix.shell().error(message)
end
