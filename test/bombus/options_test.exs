defmodule Bombus.OptionsTest do
  # What the caller's code got wrong, in every function that takes options: one wording, with what was
  # meant, and no secrets.
  use ExUnit.Case, async: true

  alias Bombus.{Hub, Model, Options, Quantization, Safetensors, Serving, Text}

  @schema [
    rank: [type: {:integer, 1..64}, default: 8, doc: "the rank"],
    top_p: [type: {:number, 0, 1}, expected: "in 0.0..1.0", default: 1.0, doc: "a share"],
    path: [type: :path, required: true, doc: "where"],
    kind: [type: {:in, [:lora, :dora]}, default: :lora, doc: "which\nkind"],
    tell: [type: {:function, 1}, by_default: "nobody", doc: "who hears"],
    names: [type: {:list, :string}, doc: "names"],
    size: [type: {:or, [{:in, [:all]}, {:integer, 1..9}]}, default: :all, doc: "how many"],
    hidden: [type: :any, doc: false],
    type: [type: {:refused, "there is one type"}]
  ]

  defp check(options), do: Options.validate!([path: "a"] ++ options, @schema, "f/1")
  defp message(fun), do: Exception.message(assert_raise(ArgumentError, fun))
  defp wrong(options), do: message(fn -> check(options) end)

  test "defaults come in the order of the table, where nothing is given" do
    assert check([]) == [
             rank: 8,
             top_p: 1.0,
             path: "a",
             kind: :lora,
             tell: nil,
             names: nil,
             size: :all,
             hidden: nil
           ]

    assert Options.given!([rank: 3], @schema, "f/1") == [rank: 3]
    # Nil is what was not given, where nothing is the default.
    assert check(tell: nil, names: nil)[:names] == nil
    assert wrong(rank: nil) == "expected :rank to be a whole number in 1..64, got: nil"
  end

  test "values that are none" do
    for {options, message} <- [
          {[rank: 0], "expected :rank to be a whole number in 1..64, got: 0"},
          {[rank: 1.0], "expected :rank to be a whole number in 1..64, got: 1.0"},
          {[top_p: 2], "expected :top_p to be in 0.0..1.0, got: 2"},
          {[kind: "lora"], "expected :kind to be :lora or :dora, got: \"lora\""},
          {[tell: &Enum.map/2],
           "expected :tell to be a function of one argument, got: &Enum.map/2"},
          {[names: ["a" | "b"]],
           "expected :names to be a list, each of it a string in UTF-8, got: [\"a\" | \"b\"]"},
          {[names: [<<255>>]],
           "expected :names to be a list, each of it a string in UTF-8, got: [<<255>>]"},
          {[size: 10], "expected :size to be :all or a whole number in 1..9, got: 10"},
          {[type: :bf16], "expected no option :type: there is one type"}
        ] do
      assert wrong(options) == message
    end

    for path <- ["", "a\0b", <<255>>, ~c"a", nil] do
      assert message(fn -> Options.validate!([path: path], @schema, "f/1") end) =~ ":path"
    end

    assert message(fn -> Options.validate!([], @schema, "f/1") end) ==
             "expected :path to be given, f/1 requires it"
  end

  test "what is no keyword list" do
    for options <- [
          %{rank: 1},
          [:rank],
          [rank: 1, rank: 2] ++ [{"a", 1}],
          [{:rank, 1} | 2],
          5,
          nil
        ] do
      assert message(fn -> Options.validate!(options, @schema, "f/1") end) =~ "keyword list"
    end

    assert wrong(rank: 1, rank: 2) == "expected the option :rank once, it is given several times"
    assert check(rank: 1, rank: 1)[:rank] == 1
  end

  test "names that are not known" do
    assert wrong(rnak: 1) == "unknown option :rnak, did you mean :rank?"

    assert wrong(zzz: 1) ==
             "unknown option :zzz, f/1 takes :rank, :top_p, :path, :kind, :tell, :names, :size"

    assert wrong(rnak: 1, tpo_p: 1) ==
             "unknown option :rnak, did you mean :rank?; unknown option :tpo_p, did you mean :top_p?"

    assert wrong(revision: "x") =~ "it belongs to the source: {:hf,"
  end

  test "the docs list names, types and defaults" do
    assert Options.docs(@schema) == """
             * `:rank` (`1..64`) - the rank. Default: `8`
             * `:top_p` (`number()`) - a share. Default: `1.0`
             * `:path` (`Path.t()`, required) - where
             * `:kind` (`:lora | :dora`) - which
               kind. Default: `:lora`
             * `:tell` (`(term() -> term())`) - who hears. Default: nobody
             * `:names` (`[String.t()]`) - names
             * `:size` (`:all | 1..9`) - how many. Default: `:all`
           """
  end

  test "the typespec of a table has every option, nil where nothing is the default" do
    assert @schema |> Options.Spec.option() |> Macro.to_string() |> String.replace(~r/\s+/, " ") ==
             "{:rank, 1..64} | {:top_p, number()} | {:path, Path.t()} | {:kind, :lora | :dora} | " <>
               "{:tell, (term() -> term()) | nil} | {:names, [String.t()] | nil} | " <>
               "{:size, :all | 1..9} | {:hidden, term() | nil}"

    assert [text: quote(do: String.t())]
           |> Options.Spec.map(Keyword.take(@schema, [:rank]))
           |> Macro.to_string() ==
             "%{required(:text) => String.t(), optional(:rank) => 1..64}"
  end

  # A type that was written by hand could not follow the table.
  test "the public types of options are those of the tables" do
    for {module, type, schema} <- [
          {Model, :option, Model.Options.schema()},
          {Hub, :option, Hub.Options.schema()},
          {Serving, :option, Serving.Options.schema() ++ Serving.Options.limits()},
          {Serving, :child_option, Serving.Loader.everything()}
        ] do
      {:ok, types} = Code.Typespec.fetch_types(module)
      {:type, spec} = Enum.find(types, &match?({:type, {^type, _, []}}, &1))
      {:"::", _, [_name, union]} = Code.Typespec.type_to_quoted(spec)
      names = for {name, entry} <- schema, not match?({:refused, _}, entry[:type]), do: name
      assert Enum.sort(Enum.uniq(names)) == union |> names() |> Enum.sort() |> Enum.uniq()
    end
  end

  defp names({:|, _, types}), do: Enum.flat_map(types, &names/1)
  defp names({:{}, _, [name, _type]}), do: [name]

  # One of each function that takes options.
  defp takers do
    model = Bombus.load_model!(:demo, device: :cpu)
    tokenizer = Bombus.load_tokenizer!(:demo)
    tensor = Bombus.Tensor.new({:f, 32}, {1, 64}, <<0::2048>>)

    %{
      "Bombus.load_model/2" => &Bombus.load_model(:demo, &1),
      "Bombus.load_adapter/2" => &Bombus.load_adapter({:demo, "pirate"}, &1),
      "Bombus.load_tokenizer/2" => &Bombus.load_tokenizer(:demo, &1),
      "Bombus.score/3" => &Bombus.score(model, [1, 2], &1),
      "Bombus.embed/4" => &Bombus.embed(model, tokenizer, ["a"], &1),
      "Bombus.rerank/5" => &Bombus.rerank(model, tokenizer, "a", ["a"], &1),
      "Bombus.Serving.new/3" => &Serving.new(model, nil, &1),
      "Bombus.Hub.download/2" => &Hub.download("owner/name", &1),
      "Bombus.Hub.cached/1" => &Hub.cached/1,
      "{:hf, \"owner/name\", options}" => &Bombus.load_model({:hf, "owner/name", &1}),
      "Bombus.Safetensors.read/2" => &Safetensors.read("a", &1),
      "Bombus.Safetensors.write/3" => &Safetensors.write("a", %{}, &1),
      "Bombus.Safetensors.read_tensor/3" => &Safetensors.read_tensor("a", "b", &1),
      "Bombus.Quantization" => &Quantization.quantize(tensor, 64, 4, &1)
    }
  end

  test "every function says so of maps, of improper lists and of unknown names" do
    for {name, take} <- takers() do
      for options <- [%{zzzz: 1}, [:zzzz], [{:zzzz, 1} | 2], "zzzz", 1] do
        assert message(fn -> take.(options) end) =~ "options of #{name} to be a keyword list"
      end

      assert message(fn -> take.(zzzz: 1) end) =~ "unknown option :zzzz, #{name} takes"
      # Nothing that looks like a secret is shown.
      for options <- [%{auth_token: "hf_s3cret"}, [auth_tokn: "hf_s3cret"], [token: "hf_s3cret"]] do
        refute message(fn -> take.(options) end) =~ "s3cret"
      end
    end

    for wrong <- [%{name: A, serving: 1}, [{:name, A} | 1], "x"] do
      assert message(fn -> Serving.child_spec(wrong) end) =~ "keyword list"
      assert message(fn -> Serving.start_link(wrong) end) =~ "keyword list"
    end
  end

  test "names of other libraries mean ours" do
    model = Bombus.load_model!(:demo, device: :cpu)
    serving = Serving.new(model, Bombus.load_tokenizer!(:demo))

    for {other, own} <- [
          max_tokens: :max_new_tokens,
          max_length: :max_new_tokens,
          n_predict: :max_new_tokens,
          num_predict: :max_new_tokens,
          stop_sequences: :stop,
          stop_strings: :stop,
          top_logprobs: :logprobs,
          lora: :adapter,
          adapters: :adapter,
          lora_path: :adapter,
          repeat_penalty: :repetition_penalty,
          enable_thinking: :template_options,
          sede: :seed
        ] do
      expected = "unknown option #{inspect(other)}, did you mean #{inspect(own)}?"
      assert message(fn -> Serving.new(model, nil, [{other, 1}]) end) == expected
      assert message(fn -> Serving.run(serving, %{other => 1, :text => "a"}) end) == expected
    end

    for {other, own} <- [system: :messages, prompt: :text, ids: :token_ids] do
      input = %{other => "a", :text => "a"}
      assert message(fn -> Serving.run(serving, input) end) =~ "did you mean #{inspect(own)}?"
    end

    assert message(fn -> Serving.new(model, nil, device: :cpu) end) =~ "Bombus.load_model/2"
    assert message(fn -> Bombus.load_model(:demo, temperature: 1) end) =~ "Bombus.Serving.new/3"
  end

  test "devices, backends and types of other libraries" do
    for {options, words} <- [
          {[device: :cuda], "device: :gpu is MLX on Metal or on an NVIDIA card"},
          {[device: :metal], "device: :gpu"},
          {[device: :mps], "device: :gpu"},
          {[device: "cuda:0"], "CUDA_VISIBLE_DEVICES"},
          {[device: {:gpu, 1}], "CUDA_VISIBLE_DEVICES=1"},
          {[device: {:cuda, 1}], "CUDA_VISIBLE_DEVICES"},
          {[device: "cpu"], "an atom, device: :cpu"},
          {[device: "GPU"], "an atom, device: :gpu"},
          {[device: :host], "device: :cpu"},
          {[device: :tpu], "got: :tpu"},
          {[device: 1], "expected :device to be :auto, :gpu, :cpu or {:mlx, :cpu}, got: 1"},
          {[backend: :cuda], "write device: :gpu or :cpu"},
          {[backend: MyApp.Anything], "expected :backend to be a backend of Nx"},
          {[backend: String], "knows no backend of this name"},
          {[backend: {String, []}], "knows no backend of this name"},
          {[backend: true], "expected :backend to be {module, device: device}"},
          {[backend: {EXLA.Backend, device: :cuda}], "device: :gpu"},
          {[backend: {EXLA.Backend, gpu: 1}], "only its device is read"},
          {[type: :bf16], "weights keep the types of the checkpoint"},
          {[module: Bumblebee.Text.Llama], "config.json says which model it is"},
          {[architecture: :base], "config.json"},
          {[params_filename: "a"], "model*.safetensors"},
          {[log_params_diff: true], "an error that names it"},
          {[spec: %{}], "config.json"}
        ] do
      assert message(fn -> Bombus.load_model(:demo, options) end) =~ words
    end
  end

  describe "a model, a tokenizer, an adapter" do
    # A reference as another node makes it.
    defp foreign do
      :erlang.binary_to_term(
        <<131, 90, 0, 3, 119, 10, "other@host", 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3>>
      )
    end

    test "of another node says so, in every function that takes one" do
      assert node(foreign()) == :other@host
      model = Bombus.load_model!(:demo, device: :cpu)
      tokenizer = Bombus.load_tokenizer!(:demo)
      adapter = Bombus.load_adapter!({:demo, "pirate"})
      far = %{model | ref: foreign()}
      far_tokenizer = %{tokenizer | ref: foreign()}
      far_adapter = %{adapter | ref: foreign()}
      serving = Serving.new(model, tokenizer)

      for run <- [
            fn -> Bombus.score(far, [1, 2]) end,
            fn -> Bombus.score(model, [1, 2], adapter: far_adapter) end,
            fn -> Bombus.save_model(far, "x") end,
            fn -> Serving.new(far, tokenizer) end,
            fn -> Serving.new(model, far_tokenizer) end,
            fn -> Serving.new(model, tokenizer, adapter: far_adapter) end,
            fn -> Serving.run(%{serving | model: far}, "a") end,
            fn -> Serving.stream(%{serving | model: far}, "a") end,
            fn -> Serving.run(serving, %{text: "a", adapter: far_adapter}) end,
            fn -> Serving.child_spec(name: A, model: far, tokenizer: nil) end
          ] do
        assert message(run) =~ ":other@host"
      end

      assert message(fn -> Bombus.score(far, [1, 2]) end) =~
               "Bombus.Serving.batched_run({name, :other@host}, input)"
    end

    test "is what it is made by" do
      model = Bombus.load_model!(:demo, device: :cpu)

      for wrong <- [:demo, nil, %{}, {:ok, model}] do
        for run <- [
              fn -> Bombus.score(wrong, [1]) end,
              fn -> Bombus.save_model(wrong, "x") end,
              fn -> Serving.new(wrong, nil) end,
              fn -> Text.generation(wrong, nil) end
            ] do
          assert_raise ArgumentError, ~r/a model made by|Nx/, fn -> nx_or(run) end
        end
      end

      assert_raise ArgumentError, ~r/a list of at least one token id/, fn ->
        Bombus.score(model, [1 | 2])
      end

      assert_raise ArgumentError, ~r/the path of a folder/, fn -> Bombus.save_model(model, "") end
    end

    # Bombus.Text needs Nx, which is an exception of its own.
    defp nx_or(run) do
      run.()
    rescue
      error in RuntimeError -> raise ArgumentError, error.message
    end

    test "shows what it is, and no secret" do
      model = Bombus.load_model!(:demo, device: :cpu)
      tokenizer = Bombus.load_tokenizer!(:demo)
      adapter = Bombus.load_adapter!({:demo, "pirate"})
      shown = inspect(adapter)
      assert shown =~ "name: \"pirate\""
      assert shown =~ "rank: #{adapter.rank}"
      assert shown =~ "scale: #{adapter.scale}"
      plain = inspect(Serving.new(model, tokenizer), limit: :infinity)
      assert plain =~ "#Bombus.Serving<"
      assert plain =~ "name: \"demo\""
      refute plain =~ "temperature"

      options = [adapter: adapter, temperature: 0.7, stop: "\n", max_batch_size: 2]
      shown = inspect(Serving.new(model, tokenizer, options), limit: :infinity)

      for words <- ["temperature: 0.7", "pirate", ~S(stop: ["\n"]), "max_batch_size: 2"],
          do: assert(shown =~ words)

      refute shown =~ "Reference"
      refute shown =~ "top_k"
    end
  end

  describe "a source" do
    test "of the package is one of the package" do
      for name <- ["../..", "../demo", "pirate/", "/etc", "", "pirate\0", "nobody"] do
        assert {:error, %Bombus.Error{reason: :not_found} = error} =
                 Bombus.load_adapter({:demo, name})

        assert error.message =~ "\"pirate\""
      end
    end

    test "that is no path, or none at all" do
      for source <- [
            {:local, ""},
            {:local, nil},
            {:local, ~c"models"},
            {:local, "a\0b"},
            {:local, <<255>>},
            "",
            "a\0b",
            :dmeo,
            {:hf, "a", [], :more},
            ["a" | "b"],
            %{a: 1},
            nil
          ] do
        for load <- [&Bombus.load_model/1, &Bombus.load_tokenizer/1, &Bombus.load_adapter/1] do
          assert_raise ArgumentError, ~r/expected (a source|the path)/, fn -> load.(source) end
        end
      end
    end

    test "that is neither here nor on the Hub says both" do
      assert {:error, error} = Bombus.load_model("owner/nothere")
      assert error.message =~ ~s({:hf, "owner/nothere"})
      word = Bombus.Source.from_word("owner/nothere")
      assert word == {:hf, "owner/nothere"}
      {:hf, id} = word

      assert {:error, %Bombus.Error{reason: :offline} = error} =
               Bombus.load_model({:hf, id, offline: true})

      assert error.message =~ "There is no folder `owner/nothere` here either"
    end
  end

  test "every option of a table has a type that is checked, and a doc" do
    for table <- [Serving.Options.schema(), Model.Options.schema(), Hub.Options.schema()],
        {key, entry} <- table do
      assert entry[:type], "#{key} has no type"
      assert entry[:doc] || match?({:refused, _why}, entry[:type]), "#{key} has no doc"
    end
  end
end
